"""Does it train as well as synchronous training? Methods at equal tokens and equally tuned, and the ablations behind defaults.

    OMP_NUM_THREADS=1 python benchmarks/quality/study.py                             # the study of docs/results.md
    python benchmarks/quality/study.py --preset gpu --out gpu.json --figures gpu     # hours on a GPU

Everything is simulated: M replicas are M rows of one matrix in one process, stepped by the same ``DesLoc`` that trains across
nodes. Finished runs are kept: stopped and started again, it goes on where it was.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path.append(str(BENCHMARKS))

import torch  # noqa: E402
from choice import at_best_rate  # noqa: E402
from findings import tables  # noqa: E402
from ledger import Ledger  # noqa: E402
from methods import PRESETS, Preset, Run, ablations, tuning  # noqa: E402
from plots import draw  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from trial import train  # noqa: E402

RESULTS = BENCHMARKS / "results" / "quality.json"
PARTS = ("tuning", "seeds", "ablations")


def wanted(part: str, preset: Preset, ledger: Ledger) -> list[Run]:
    """The runs of a part of the study, the first seed's first; those of ``seeds`` are known once ``tuning`` has finished."""
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(all, then tables and figures)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="finished runs, also those of before (%(default)s)")
    parser.add_argument("--figures", type=Path, default=BENCHMARKS.parent / "docs" / "figures", help="folder (%(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    preset = PRESETS[args.preset]
    ledger = Ledger(args.out, preset)
    for part in args.parts:
        finish(wanted(part, preset, ledger), preset, ledger, part)
    if set(args.parts) == set(PARTS):
        draw(preset, ledger, args.figures)
        print("\n\n".join(tables(preset, ledger).values()))


if __name__ == "__main__":
    main()
