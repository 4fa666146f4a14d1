"""MT-DAO's recipe in simulation: one synchronous start, every method from it, at a constant rate and after a decay.

    python -m benchmarks.quality.recipe                    # hours on two cores, most important runs first
    python -m benchmarks.quality.recipe --parts 68k ends   # some of it; and its tables

Each method is tuned over the rates of a setting on the first seed, by its loss before the decay, by that of its mean
over time, and by that after the decay; the winners are run on all seeds. Beside the replicas' mean its exponential mean
over time (0.99) is looked at, which a slow momentum and a decay compete with. Resumes from what
benchmarks/results/recipe.json has, and prints the tables of docs/results.md.
"""

import os
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path

from benchmarks.quality.recipe.parts import SINGLE, TUNED, wanted
from benchmarks.quality.recipe.plots import draw
from benchmarks.quality.recipe.settings import SETTINGS
from benchmarks.quality.recipe.tables import tables
from benchmarks.quality.recipe.trial import train
from benchmarks.simulation.resumable import finish

RESULTS = Path(__file__).resolve().parents[2] / "results" / "recipe.json"
FIGURES = RESULTS.parents[2] / "docs" / "figures"
PARTS = [*TUNED, *SINGLE]


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, of a thread each")
    given = parser.parse_args()
    # one part after the other, so that what matters most is whole first
    settings = {name: asdict(setting) for name, setting in SETTINGS.items()}
    for part in given.parts:
        runs = finish(RESULTS, settings, train, lambda runs, part=part: wanted(runs, [part]), given.processes)
    if given.parts == PARTS:
        draw(runs, FIGURES)
    print("\n\n".join(tables(runs).values()))


if __name__ == "__main__":
    main()
