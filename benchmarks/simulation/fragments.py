"""Averages in fragments against bursts, in simulation: the byte-level GPT of examples/ with the shipped optimizer.

    OMP_NUM_THREADS=1 python -m benchmarks.simulation.fragments [--processes 1] [--quick]

Four replicas at the same periods, bytes, rate and data; only when each part of a state is averaged differs. Resumes
from what benchmarks/results/fragments.json has, and prints the table of docs/streaming.md.
"""

import math
import statistics
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.simulation.resumable import finish
from benchmarks.simulation.small_gpt import GPTConfig, small_gpt
from deslo_plugin.simulation import simulate, warmup_cosine

RESULTS = Path(__file__).resolve().parents[1] / "results" / "fragments.json"
SHAPE = GPTConfig(dim=64, layers=2, heads=4, context=64)
REPLICAS, SEQUENCES, STEPS, SEEDS = 4, 4, 640, (0, 1, 2)
LR, NORM_CLIP = 2e-3, 1.0
SCHEDULES: dict[str, tuple[int, int, int]] = {"Local Adam": (32, 32, 32), "DES-LOC": (32, 96, 192)}
FRAGMENTS = (1, 4, 8, 32)


def train(method: str, fragments: int, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """One run: the held-out loss of the replicas' mean at the end, in nats, and the bytes of a replica."""
    torch.set_num_threads(1)
    every = dict(zip(("params", "exp_avg", "exp_avg_sq"), SCHEDULES[method]))
    config = {"optimizer": {"params": {"lr": LR, "sync_every": every}}, "deslo": {"fragments": fragments}}
    objective = small_gpt(SHAPE, sequences=SEQUENCES, replicas=REPLICAS, seed=seed, held_out=2)
    for moment in simulate(
        objective, config, replicas=REPLICAS, steps=steps, rate=warmup_cosine(steps), norm_clip=NORM_CLIP
    ):
        replicas = moment.replicas
    loss = float(objective.evaluate(replicas.state("params").mean(0, keepdim=True)))
    sent = sum(replicas.optimizer.stats.bytes.values())
    return {"method": method, "fragments": fragments, "seed": seed, "loss": round(loss, 4), "bytes": sent}


def wanted(known: list[dict[str, Any]]) -> Iterator[tuple[str, int, int]]:
    done = {(run["method"], run["fragments"], run["seed"]) for run in known}
    each = ((method, count, seed) for seed in SEEDS for method in SCHEDULES for count in FRAGMENTS)
    yield from (run for run in each if run not in done)


def shown(runs: list[dict[str, Any]]) -> Table:
    """Loss of each number of fragments, and its difference to bursts of the same seed: mean, and spread over seeds."""
    table = Table("method", "fragments", "held-out nats", "against bursts", "perplexity, %", "bytes, times")
    for method in SCHEDULES:
        burst = {run["seed"]: run for run in runs if run["method"] == method and run["fragments"] == 1}
        for count in FRAGMENTS:
            own = [run for run in runs if run["method"] == method and run["fragments"] == count]
            pairs = [(run, burst[run["seed"]]) for run in own if run["seed"] in burst]
            if not pairs:
                continue
            less = [run["loss"] - other["loss"] for run, other in pairs]
            spread = f" +- {statistics.stdev(less):.4f}" if len(less) > 1 else ""
            table.add_row(
                method,
                str(count),
                f"{statistics.mean(run['loss'] for run in own):.4f}",
                f"{statistics.mean(less):+.4f}{spread}",
                f"{100 * (math.exp(statistics.mean(less)) - 1):+.2f}",
                f"{statistics.mean(run['bytes'] / other['bytes'] for run, other in pairs):.3f}",
            )
    return table


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one run of 8 steps; nothing is written")
    given = parser.parse_args()
    if given.quick:
        print(train("DES-LOC", 4, 0, 8))
        return
    settings = {"steps": STEPS, "lr": LR, "replicas": REPLICAS, "shape": vars(SHAPE)}
    runs = finish(RESULTS, settings, train, wanted, given.processes)
    Console(width=120).print(shown(runs))


if __name__ == "__main__":
    main()
