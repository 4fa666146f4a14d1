"""MT-DAO's recipe in simulation: one synchronous start, every method from it, at a constant rate and after a decay.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.recipe [--processes 1] [--quick]

All runs of a seed are one run until the switch: synchronous ADOPT on four replicas. Then the rate stays constant for
three times as long, and falls to 0 as 1 - sqrt over the last fifth. Each method is tuned over the same rates on the
first seed, by its loss before the decay and by that after it; both winners are run on all seeds. Beside the replicas'
mean their exponential mean over time (0.99) is looked at, which a slow momentum and a decay compete with. Resumes from
what benchmarks/results/recipe.json has, and prints the table of docs/results.md.
"""

import math
import statistics
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.simulation.resumable import finish
from benchmarks.simulation.small_gpt import GPTConfig, small_gpt
from deslo_plugin.errors import NonFiniteError
from deslo_plugin.simulation import simulate

RESULTS = Path(__file__).resolve().parents[1] / "results" / "recipe.json"
SHAPE = GPTConfig(dim=48, layers=2, heads=4, context=64)
REPLICAS, SEQUENCES, SEEDS, PERIOD = 4, 4, (0, 1, 2), 32
WARM_UP, SWITCH, DECAY, STEPS = 100, 500, 1600, 2000
RATES = (2.5e-3, 5e-3, 1e-2)
NORM_CLIP, BETA2, EMA = 1.0, 0.999, 0.99
MOMENTS = ("constant", "constant, mean over time", "decayed")
FAST, SLOW = 0.9, 0.99  # the half-life of the slow one, 69 steps, is a 22nd of what follows the switch

METHODS: dict[str, dict[str, Any]] = {
    "synchronous ADOPT": {"synchronous": True},
    "synchronous QH": {"synchronous": True, "switch": {"betas": [SLOW], "weights": [0.95]}},
    "Local ADOPT": {},
    "DES-LOC, 32 / 96 / 192": {"times": (1, 3, 6)},
    "MT-DAO": {"switch": {"betas": [SLOW], "weights": [0.95]}},
    "MT-DAO, rate x 2": {"switch": {"betas": [SLOW], "weights": [0.95], "lr_factor": 2.0}},
    "MT-DAO, momentum kept": {"switch": {"betas": [SLOW], "weights": [0.95], "reset": []}},
}


def config(method: str, lr: float) -> dict[str, Any]:
    given = METHODS[method]
    x, u, v = (PERIOD * times for times in given.get("times", (1, 1, 1)))
    params: dict[str, Any] = {
        "rule": "adopt",
        "lr": lr,
        "momenta": [{"beta": FAST, "weight": 1.0, "sync_every": u}],
        "second_moment": {"beta": BETA2, "sync_every": v},
        "sync_every": {"params": x},
    }
    if "switch" in given:
        params["switch"] = {"at": SWITCH} | given["switch"]
    # synchronous training stays so until after the last step, and its update still switches in time
    synchronous = 0 if given.get("synchronous") else SWITCH
    return {"optimizer": {"params": params}, "deslo": {"synchronous_steps": synchronous}}


def rate(step: int) -> float:
    if step < DECAY:
        return min(1.0, (step + 1) / WARM_UP)
    return 1 - math.sqrt((step - DECAY) / (STEPS - DECAY))


class Together:
    """What all replicas see, as one replica's: synchronous training on the same data."""

    def __init__(self, apart: Any):
        self.start, self.evaluate, self._apart = apart.start, apart.evaluate, apart

    def losses(self, x: torch.Tensor, replicas: Sequence[int], step: int) -> torch.Tensor:
        everyone = list(range(REPLICAS))
        return self._apart.losses(x.expand(REPLICAS, -1), everyone, step).mean(0, keepdim=True)


def train(method: str, lr: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Held-out nats of the replicas' mean before the decay, of its mean over time, and after the decay; infinite where
    it broke. One replica of the whole batch is synchronous training."""
    torch.set_num_threads(1)
    together = METHODS[method].get("synchronous", False)
    objective: Any = small_gpt(SHAPE, sequences=SEQUENCES, replicas=REPLICAS, seed=seed, held_out=4)
    objective, count = (Together(objective), 1) if together else (objective, REPLICAS)
    found, over_time = dict.fromkeys(MOMENTS, math.inf), torch.zeros(())
    try:
        for moment in simulate(
            objective, config(method, lr), replicas=count, steps=steps, rate=rate, norm_clip=NORM_CLIP
        ):
            mean = moment.replicas.state("params").mean(0, keepdim=True)
            over_time = mean if moment.steps <= SWITCH else EMA * over_time + (1 - EMA) * mean
            if moment.steps == DECAY:
                found[MOMENTS[0]], found[MOMENTS[1]] = (float(objective.evaluate(x)) for x in (mean, over_time))
        found[MOMENTS[2]] = float(objective.evaluate(mean))
    except NonFiniteError:
        pass
    return {"method": method, "lr": lr, "seed": seed} | {name: round(loss, 4) for name, loss in found.items()}


def wanted(runs: list[dict[str, Any]]) -> Iterator[tuple[str, float, int]]:
    """The grid of rates on the first seed, then what won there on the others."""
    done = {(run["method"], run["lr"], run["seed"]) for run in runs}
    for method in METHODS:
        yield from ((method, lr, SEEDS[0]) for lr in RATES if (method, lr, SEEDS[0]) not in done)
    for seed in SEEDS[1:]:
        for method in METHODS:
            yield from ((method, lr, seed) for lr in sorted(set(best(runs, method))) if (method, lr, seed) not in done)


def best(runs: list[dict[str, Any]], method: str) -> list[float]:
    """The rate for each of ``MOMENTS``; none until the first seed's grid is complete."""
    grid = [run for run in runs if run["method"] == method and run["seed"] == SEEDS[0]]
    return [min(grid, key=lambda run: run[name])["lr"] for name in MOMENTS] if len(grid) == len(RATES) else []


def shown(runs: list[dict[str, Any]]) -> Table:
    """Each method at its best rate: mean and spread over seeds, and what it lacks of synchronous ADOPT at its best."""
    table = Table(
        "", *(f"{name}: nats (rate)" for name in MOMENTS), *(f"{name}, against synchronous" for name in MOMENTS)
    )
    columns: dict[str, list[tuple[dict[int, float], float]]] = {}
    for method in METHODS:
        for name, lr in zip(MOMENTS, best(runs, method)):
            of = {run["seed"]: run[name] for run in runs if run["method"] == method and run["lr"] == lr}
            columns.setdefault(method, []).append((of, lr))
    reference = columns.get("synchronous ADOPT", [])
    for method, found in columns.items():
        less = [[of[seed] - base[seed] for seed in of if seed in base] for (of, _), (base, _) in zip(found, reference)]
        table.add_row(
            method,
            *(f"{statistics.mean(of.values()):.4f} ({lr:g})" for of, lr in found),
            *(f"{statistics.mean(d):+.4f}" + (f" +- {statistics.stdev(d):.4f}" if len(d) > 1 else "") for d in less),
        )
    return table


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the first steps of one run; nothing is written")
    given = parser.parse_args()
    if given.quick:
        print(train("synchronous ADOPT", 5e-3, 0, 40))
        return
    settings = {"steps": STEPS, "switch": SWITCH, "decay": DECAY, "replicas": REPLICAS, "shape": vars(SHAPE)}
    runs = finish(RESULTS, settings, train, wanted, given.processes)
    Console(width=160).print(shown(runs))


if __name__ == "__main__":
    main()
