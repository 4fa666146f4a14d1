"""Does it train as well as synchronous training? Methods at equal tokens and equally tuned, and the ablations behind
defaults.

    python -m benchmarks.quality.study                  # long runs of every method: an hour on two cores
    python -m benchmarks.quality.study --preset short   # short runs, from two starts, and the ablations: half an hour
    python -m benchmarks.quality.study --preset gpu     # hours on a GPU

Everything is simulated: M replicas are M rows of one matrix in one process, stepped by the same ``DesLoc`` that trains
across nodes. Finished runs are kept: stopped and started again, it goes on where it was.
"""

import os
from argparse import ArgumentParser
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.quality.ablations import ablations
from benchmarks.quality.choice import at_best_rate
from benchmarks.quality.findings import tables
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.methods import PRESETS, Preset, Run, tuning
from benchmarks.quality.plots import draw
from benchmarks.quality.trial import train

BENCHMARKS = Path(__file__).resolve().parents[1]

FIGURES = BENCHMARKS.parent / "docs" / "figures"
PARTS = ("tuning", "seeds", "ablations")


def wanted(part: str, preset: Preset, ledger: Ledger) -> list[Run]:
    """The runs of a part of the study, the first seed's first; those of ``seeds`` are known once ``tuning`` has
    finished."""
    if part == "tuning":
        return [each for grid in tuning(preset).values() for each in grid.values()]
    chosen = (
        at_best_rate(preset, ledger).values()
        if part == "seeds"
        else (seeds for variants in ablations(preset).values() for seeds in variants.values())
    )
    return sorted((each for seeds in chosen for each in seeds), key=lambda each: each.seed)


def results(preset: str) -> Path:
    """Where the finished runs of a preset are kept."""
    return BENCHMARKS / "results" / f"quality-{preset}.json"


def finish(runs: Iterable[Run], preset: Preset, ledger: Ledger, title: str = "runs", jobs: int = 1) -> int:
    """Trains those of ``runs`` that the ledger lacks, ``jobs`` at a time, each in a process of one thread; returns how
    many."""
    missing = list({each.key: each for each in runs if each not in ledger}.values())
    if missing:
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            trained = {pool.submit(train, each, preset): each for each in missing}
            for done in track(as_completed(trained), title, total=len(missing), console=Console(stderr=True)):
                ledger.write(trained[done], done.result())
    return len(missing)


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", choices=PRESETS, default="long", help="size of the study (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(all, then tables and figures)")
    parser.add_argument("--jobs", type=int, help="runs at a time (one for each core; one on a GPU)")
    args = parser.parse_args()

    preset = PRESETS[args.preset]
    jobs = args.jobs or (os.cpu_count() if preset.device == "cpu" else 1)
    ledger = Ledger(results(args.preset), preset)
    for part in args.parts:
        finish(wanted(part, preset, ledger), preset, ledger, part, jobs)
    if set(args.parts) == set(PARTS):
        draw(preset, ledger, FIGURES, args.preset)
        print("\n\n".join(tables(preset, ledger).values()))


if __name__ == "__main__":
    main()
