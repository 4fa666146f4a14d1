"""Adaptive periods against fixed ones, in simulation: loss and bytes of the byte-level GPT of examples/.

    OMP_NUM_THREADS=1 python -m benchmarks.simulation.adaptive [--processes 1]

Four replicas, parameters averaged every 8 steps by all; momenta as each contestant says. Writes
benchmarks/results/adaptive.json and prints the tables of docs/adaptive.md.
"""

import json
import logging
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.simulation.small_gpt import GPTConfig, small_gpt
from deslo_plugin.simulation import simulate, warmup_cosine

RESULTS = Path(__file__).resolve().parents[1] / "results" / "adaptive.json"
SHAPE = GPTConfig(dim=64, layers=2, heads=4, context=64)
REPLICAS, SEQUENCES, STEPS, PARAMS, LONGEST = 4, 4, 384, 8, 128
LR, NORM_CLIP, SEEDS = 2e-3, 1.0, [0, 1, 2]
BETAS = {"short memory": [0.9, 0.95], "long memory": [0.99, 0.999]}
FIXED: dict[str, tuple[int | None, int | None]] = {  # periods of the two momenta
    "1x / 1x": (PARAMS, PARAMS),
    "3x / 6x": (3 * PARAMS, 6 * PARAMS),
    "6x / 12x": (6 * PARAMS, 12 * PARAMS),
    "never": (None, None),
}
DRIFTS = (0.25, 0.5, 1.0)
CONTESTANTS: dict[str, tuple[Any, Any]] = FIXED | {
    f"adaptive, drift {drift:g}": ({"adaptive": {"max": LONGEST, "drift": drift}},) * 2 for drift in DRIFTS
}


def train(contestant: str, betas: str, seed: int) -> dict[str, Any]:
    """One run: the held-out loss of the replicas' mean at the end, in nats, bytes of a replica, and every change of a
    period."""
    torch.set_num_threads(1)
    logging.getLogger("deslo_plugin").addHandler(logging.NullHandler())  # every change is in the results
    first, second = CONTESTANTS[contestant]
    params = {"lr": LR, "betas": BETAS[betas], "sync_every": {"params": PARAMS, "exp_avg": first, "exp_avg_sq": second}}
    objective = small_gpt(SHAPE, sequences=SEQUENCES, replicas=REPLICAS, seed=seed, held_out=2)
    changes: list[tuple[int, dict[str, int | None]]] = []
    for moment in simulate(
        objective,
        {"optimizer": {"type": "DesLoc", "params": params}},
        replicas=REPLICAS,
        steps=STEPS,
        rate=warmup_cosine(STEPS),
        norm_clip=NORM_CLIP,
    ):
        optimizer = moment.replicas.optimizer
        periods = dict(optimizer.averaging.periods(optimizer.param_groups[0]))
        if not changes or periods != changes[-1][1]:
            changes.append((moment.steps, periods))
    loss = float(objective.evaluate(moment.replicas.state("params").mean(0, keepdim=True)))
    return {"seed": seed, "loss": round(loss, 4), "bytes": sum(optimizer.stats.bytes.values()), "periods": changes}


def equal_loss(run: Mapping[str, Any], fixed: Sequence[Mapping[str, Any]]) -> float | None:
    """Bytes that fixed periods need for the loss of ``run``, by the same seed: between the nearest two on the line of
    fixed runs that no other beats in both loss and bytes, bytes in logarithm. None outside of them."""
    line: list[Mapping[str, Any]] = []
    for each in sorted(fixed, key=lambda each: each["bytes"]):
        if not line or each["loss"] < line[-1]["loss"]:
            line.append(each)
    for cheap, dear in zip(line, line[1:]):
        if dear["loss"] <= run["loss"] <= cheap["loss"]:
            share = (cheap["loss"] - run["loss"]) / (cheap["loss"] - dear["loss"])
            return cheap["bytes"] * (dear["bytes"] / cheap["bytes"]) ** share
    return None


def table(title: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Mean and range over seeds; perplexities and bytes against runs of the same seeds."""
    columns = [
        title,
        "nats at the end",
        "perplexity, %",
        "MB sent by a replica",
        "bytes / fixed at equal loss",
        "K at the end",
    ]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name, each in runs.items():
        pairs = zip(each, runs["3x / 6x"])
        percent = [math.expm1(run["loss"] - base["loss"]) * 100 for run, base in pairs]
        sent = [run["bytes"] / 1e6 for run in each]
        ratio = (
            ""
            if name in FIXED
            else ", ".join(
                f"{run['bytes'] / needed:.2f}" if needed else _outside(run, [runs[other][index] for other in FIXED])
                for index, run in enumerate(each)
                for needed in [equal_loss(run, [runs[other][index] for other in FIXED])]
            )
        )
        ends = sorted({" / ".join(str(period) for period in list(run["periods"][-1][1].values())[1:]) for run in each})
        lines.append(
            [
                name,
                f"{statistics.mean(run['loss'] for run in each):.4f}",
                f"{statistics.mean(percent):+.2f} ({min(percent):+.2f} to {max(percent):+.2f})"
                if name != "3x / 6x"
                else "",
                f"{statistics.mean(sent):.1f}",
                ratio,
                ", ".join(ends),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _outside(run: Mapping[str, Any], fixed: Sequence[Mapping[str, Any]]) -> str:
    return "better than all" if run["loss"] < min(each["loss"] for each in fixed) else "worse than all"


def run_all(args: Namespace) -> dict[str, Any]:
    """Every contestant with every seed, as it is written to ``args.out``."""
    jobs = [(name, betas, seed) for seed in args.seeds for betas in BETAS for name in CONTESTANTS]
    results: dict[str, dict[str, list]] = {betas: {name: [] for name in CONTESTANTS} for betas in BETAS}
    pool = ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn"))
    with pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        futures = {pool.submit(train, *job): job for job in jobs}
        for future in as_completed(futures):
            name, betas, _ = futures[future]
            results[betas][name].append(future.result())
            progress.advance(bar)
    for runs in results.values():
        for each in runs.values():
            each.sort(key=lambda run: args.seeds.index(run["seed"]))
    setting = {
        "replicas": REPLICAS,
        "sequences": SEQUENCES,
        "steps": STEPS,
        "lr": LR,
        "norm_clip": NORM_CLIP,
        "betas": BETAS,
        "params": PARAMS,
        "longest": LONGEST,
    }
    return {
        "command": shlex.join(["python", "-m", "benchmarks.simulation.adaptive", *sys.argv[1:]]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "setting": setting,
        "runs": results,
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--show", action="store_true", help="run nothing: the tables of what --out holds")
    args = parser.parse_args()

    if not args.show:
        args.out.write_text(json.dumps(run_all(args)) + "\n")
    for title, runs in json.loads(args.out.read_text())["runs"].items():
        print(table(title, runs), end="\n\n")


if __name__ == "__main__":
    main()
