"""Averages in few bits against float32, state by state: the byte-level GPT of examples/ with the shipped optimizer.

    OMP_NUM_THREADS=1 python -m benchmarks.simulation.wire [--processes 1] [--quick]

Four replicas at one rate, on the same data, that average every state every 16 steps, so that each format is met as
often as can be; only what travels differs. Resumes from what benchmarks/results/wire.json has, and prints the table of
docs/wire.md.
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
from deslo_plugin.errors import NonFiniteError
from deslo_plugin.simulation import simulate, warmup_cosine

RESULTS = Path(__file__).resolve().parents[1] / "results" / "wire.json"
SHAPE = GPTConfig(dim=48, layers=2, heads=4, context=64)
REPLICAS, SEQUENCES, STEPS, SEEDS, EVERY = 4, 4, 480, (0, 1, 2), 16
LR, NORM_CLIP = 2e-3, 1.0
SHORT = {"x": "params", "u": "exp_avg", "v": "exp_avg_sq"}
NARROW = ("bfloat16", "float8", "int8", "int4")


def names(form: str) -> list[str]:
    return [SHORT[letter] for letter in form]


def cases() -> dict[str, dict[str, Any]]:
    """What is printed -> keys of ``deslo``. x, u and v are the papers' letters of the states."""
    found: dict[str, dict[str, Any]] = {"float32": {}}
    for state in "xuv":
        for name in NARROW:
            found[f"{state} {name}"] = wire({state: name}, difference="x" if state == "x" else "")
        for name in ("int8", "int4"):
            found[f"{state} {name}, feedback"] = wire(
                {state: name}, difference="x" if state == "x" else "", feedback=state
            )
    found["x int8, no difference"] = wire({"x": "int8"})
    found["x int4, no difference"] = wire({"x": "int4"})
    found["u int4, difference"] = wire({"u": "int4"}, difference="u")
    found["u int4, difference, feedback"] = wire({"u": "int4"}, difference="u", feedback="u")
    for name in NARROW:
        found[f"all {name}, feedback of x"] = wire(dict.fromkeys("xuv", name), difference="x", feedback="x")
    found["all int8"] = wire(dict.fromkeys("xuv", "int8"), difference="x")
    found["all int4, feedback of x and u"] = wire(dict.fromkeys("xuv", "int4"), difference="x", feedback="xu")
    found["x int4, u and v int8, feedback of x"] = wire(
        {"x": "int4", "u": "int8", "v": "int8"}, difference="x", feedback="x"
    )
    return found


def wire(of: dict[str, str], *, difference: str = "", feedback: str = "") -> dict[str, Any]:
    formats = {SHORT[letter]: name for letter, name in of.items()}
    return {"wire_dtype": formats, "wire_difference": names(difference), "wire_feedback": names(feedback)}


def train(case: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """One run: the held-out loss of the replicas' mean at the end, in nats, and the bytes of a replica; infinite where
    it broke."""
    torch.set_num_threads(1)
    every = dict.fromkeys(SHORT.values(), EVERY)
    config = {"optimizer": {"params": {"lr": LR, "sync_every": every}}, "deslo": cases()[case]}
    objective = small_gpt(SHAPE, sequences=SEQUENCES, replicas=REPLICAS, seed=seed, held_out=2)
    try:
        for moment in simulate(
            objective, config, replicas=REPLICAS, steps=steps, rate=warmup_cosine(steps), norm_clip=NORM_CLIP
        ):
            replicas = moment.replicas
        loss = float(objective.evaluate(replicas.state("params").mean(0, keepdim=True)))
    except NonFiniteError:
        loss = math.inf
    sent = sum(replicas.optimizer.stats.bytes.values())
    return {"case": case, "seed": seed, "loss": round(loss, 4), "bytes": sent}


def wanted(known: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    done = {(run["case"], run["seed"]) for run in known}
    yield from ((case, seed) for seed in SEEDS for case in cases() if (case, seed) not in done)


def shown(runs: list[dict[str, Any]]) -> Table:
    """Loss of each case, and its difference to float32 of the same seed: mean, and spread over seeds."""
    table = Table("what travels in few bits", "held-out nats", "against float32", "perplexity, %", "bytes, times")
    whole = {run["seed"]: run for run in runs if run["case"] == "float32"}
    for case in cases():
        pairs = [(run, whole[run["seed"]]) for run in runs if run["case"] == case and run["seed"] in whole]
        if not pairs:
            continue
        less = [run["loss"] - other["loss"] for run, other in pairs]
        spread = f" +- {statistics.stdev(less):.4f}" if len(less) > 1 else ""
        table.add_row(
            case,
            f"{statistics.mean(run['loss'] for run, _ in pairs):.4f}",
            f"{statistics.mean(less):+.4f}{spread}",
            f"{100 * (math.exp(statistics.mean(less)) - 1):+.2f}",
            f"{statistics.mean(run['bytes'] / other['bytes'] for run, other in pairs):.3f}",
        )
    return table


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one run of 40 steps; nothing is written")
    given = parser.parse_args()
    if given.quick:
        print(train("x int4, u and v int8, feedback of x", 0, 40))
        return
    settings = {"steps": STEPS, "lr": LR, "every": EVERY, "replicas": REPLICAS, "shape": vars(SHAPE)}
    runs = finish(RESULTS, settings, train, wanted, given.processes)
    Console(width=120).print(shown(runs))


if __name__ == "__main__":
    main()
