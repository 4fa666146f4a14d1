"""Does it train as well as synchronous training? Methods at equal tokens and equally tuned, and the ablations behind defaults.

    OMP_NUM_THREADS=1 python benchmarks/quality/study.py                          # the study of docs/results.md
    python benchmarks/quality/study.py --preset gpu --out gpu.json --parts tuning # hours on one GPU

Everything is simulated: M replicas are M rows of one matrix in one process, stepped by the same ``DesLoc`` that trains across
nodes. Finished runs are kept: stopped and started again, it goes on where it was.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from ledger import Ledger  # noqa: E402
from methods import PRESETS, Preset, Run, ablations, run, tuning  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from trial import train  # noqa: E402

RESULTS = Path(__file__).resolve().parent.parent / "results" / "quality.json"
PARTS = ("tuning", "seeds", "ablations")


def best_rates(preset: Preset, ledger: Ledger) -> dict[tuple[str, bool], float]:
    """(method, warm-up) -> the rate of the grid with the lowest validation loss at the end, on the first seed."""
    def loss(each: Run) -> float:
        end = ledger.final(each)
        return float("inf") if end is None else end

    return {variant: min(grid, key=lambda rate: loss(grid[rate])) for variant, grid in tuning(preset).items()}


def at_best_rate(preset: Preset, ledger: Ledger) -> dict[tuple[str, bool], list[Run]]:
    """(method, warm-up) -> its run at its best rate for each seed."""
    return {
        (name, warm_up): [run(preset, name, rate=rate, seed=seed, warm_up=warm_up) for seed in preset.seeds]
        for (name, warm_up), rate in best_rates(preset, ledger).items()
    }


def wanted(part: str, preset: Preset, ledger: Ledger) -> list[Run]:
    """The runs of a part of the study; those of ``seeds`` are known once ``tuning`` has finished."""
    if part == "tuning":
        return [each for grid in tuning(preset).values() for each in grid.values()]
    chosen = at_best_rate(preset, ledger).values() if part == "seeds" else (
        seeds for variants in ablations(preset).values() for seeds in variants.values())
    return sorted((each for seeds in chosen for each in seeds), key=lambda each: each.seed)


def finish(runs: Iterable[Run], preset: Preset, ledger: Ledger, title: str = "runs") -> int:
    """Trains those of ``runs`` that the ledger lacks; returns how many."""
    missing = list({each.key: each for each in runs if each not in ledger}.values())
    for each in track(missing, title, console=Console(stderr=True), disable=not missing):
        ledger.write(each, train(each, preset))
    return len(missing)


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size of the study (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(all; seeds needs tuning)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="finished runs, also those of before (%(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    preset = PRESETS[args.preset]
    ledger = Ledger(args.out, preset)
    for part in args.parts:
        finish(wanted(part, preset, ledger), preset, ledger, part)


if __name__ == "__main__":
    main()
