"""Which runs answer which question, in order of worth."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.quality.recipe.methods import ABLATED, BETAS, BUDGET, CORE, ENDS, OUTER, RECIPE
from benchmarks.quality.recipe.settings import SETTINGS
from benchmarks.quality.recipe.trial import DECAYED, MOMENTS

Runs = list[dict[str, Any]]
Wanted = tuple[str, str, float, int, bool]
FIRST = "68k"
BUDGET_OF_ADAM = [name for name in BUDGET if name.startswith(("DES-LOC, 4", "MT-DAO"))]

LAST_END = f"{DECAYED}, {tuple(ENDS)[-1]}"
TUNED = {
    FIRST: tuple(RECIPE),
    "Adam": CORE,
    "2 replicas": CORE[1:],
    "8 replicas": CORE[1:],
    "own parts of the text": CORE,
    "teacher": CORE,
    "13k": CORE,
    "batch x 4": CORE,
    "twice as long": CORE,
}
"""Setting -> methods that are tuned there over its rates, on the first seed, and then run on all."""

SINGLE: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
    "ends": [(FIRST, name, (0, 1, 2)) for name in CORE[1:]],
    "outer step": [("one node", name, (0, 1)) for name in OUTER if name.startswith("DiLoCo")]
    + [(FIRST, name, (0, 1)) for name in OUTER if name.startswith("DiLoCo") or "0.7" in name]
    + [("8 replicas", name, (0, 1)) for name in OUTER if name.startswith("DiLoCo")],
    "budget": [(FIRST, name, (0, 1, 2)) for name in BUDGET],
    "budget, Adam": [("Adam", name, (0, 1, 2)) for name in BUDGET_OF_ADAM],
    "ablations": [(FIRST, name, (0, 1, 2)) for name in ABLATED],
    "betas": [(FIRST, name, (0,)) for name in BETAS],
}
"""Part -> setting, method and seeds, all at one rate."""


def wanted(runs: Runs, parts: Iterable[str]) -> Iterator[Wanted]:
    """What ``parts`` lack: of what is tuned the grid first, and then what won there on the other seeds."""
    done = {(run["setting"], run["method"], run["lr"], run["seed"], LAST_END in run) for run in runs}
    some = {run[:4] for run in done}
    for part in parts:
        if part in TUNED:
            yield from (each for each in tuned(runs, part) if each[:4] not in some)
        else:
            ends = part == "ends"
            cases = ((*each[:2], one_rate(each[0]), seed, ends) for each in SINGLE[part] for seed in each[2])
            yield from (case for case in cases if (case not in done if ends else case[:4] not in some))


def one_rate(setting: str) -> float:
    """Of what is not tuned: best after a decay for synchronous training and for local methods, on the first seed."""
    return 5e-3 if setting == "Adam" else 2.5e-3


def tuned(runs: Runs, part: str) -> Iterator[Wanted]:
    setting = SETTINGS[part]
    for method in TUNED[part]:
        yield from ((part, method, lr, setting.seeds[0], False) for lr in setting.rates)
    for seed in setting.seeds[1:]:
        for method in TUNED[part]:
            yield from ((part, method, lr, seed, False) for lr in sorted(set(best(runs, part, method).values())))


def best(runs: Runs, setting: str, method: str) -> dict[str, float]:
    """The rate for each of ``MOMENTS``; none until the first seed's grid is complete."""
    first, rates = SETTINGS[setting].seeds[0], SETTINGS[setting].rates
    grid = [run for run in runs if (run["setting"], run["method"], run["seed"]) == (setting, method, first)]
    grid = [run for run in grid if run["lr"] in rates]
    if {run["lr"] for run in grid} != set(rates):
        return {}
    return {moment: min(grid, key=lambda run: run[moment])["lr"] for moment in MOMENTS}
