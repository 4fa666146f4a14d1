"""Coordinates whose gradient is often zero on some replicas: what averages of momenta on unequal periods do to them.

    OMP_NUM_THREADS=1 python -m benchmarks.simulation.rare --processes 2   # minutes on two cores
    python -m benchmarks.simulation.rare --show                            # the tables and the figure of what is there

Simulated replicas, periods 16 / 48 / 96, three seeds. Rare tokens: a language of Zipf-distributed tokens with an untied
embedding, which the next layer takes as it is, or normalised. Dead ReLUs: a small convolutional network on synthetic
images in the manner of DeepSpeed's CIFAR example. Sparse quadratic: coordinates seen with chances from 1 to 1/50, with
noise, from afar and from the minimum. Dense: the byte-level transformer of ``deslo simulate``.

Writes benchmarks/results/rare.json, prints the tables of docs/rare-coordinates.md and draws docs/figures/rare.png.
"""

import json
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.simulation.rare_tasks import REPLICAS, TASKS
from deslo_plugin import NonFiniteError
from deslo_plugin.algorithm.state_names import PARAMS, SECOND_MOMENT
from deslo_plugin.simulation import simulate, warmup_cosine

RESULTS = Path(__file__).resolve().parents[1] / "results" / "rare.json"
FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "rare.png"
SEEDS, PERIOD, NORM_CLIP = (0, 1, 2), 16, 1.0


DRAWN = ("rare tokens", "dead ReLUs", "dense")


class Method(NamedTuple):
    """Multiples of the parameters' period, what keeps |u| <= C sqrt(v) once u has landed: ``"hold"`` u, as DesLoc does,
    ``"raise"`` v, or nothing, and the rule."""

    first: int | None
    second: int | None
    keep: str = "hold"
    rule: str = "adam"
    synchronous: bool = False


METHODS = {
    "synchronous AdamW": Method(1, 1, synchronous=True),
    "Local Adam, 1x/1x/1x": Method(1, 1),
    "1x/3x/6x as printed": Method(3, 6, "nothing"),
    "(a) 1x/3x/6x, u held": Method(3, 6),
    "(b) 1x/3x/6x, v raised": Method(3, 6, "raise"),
    "(c) 1x/3x/3x": Method(3, 3),
    "ADOPT, 1x/3x/6x": Method(3, 6, rule="adopt"),
}


def watch(optimizer: Any, keep: str, bound: float) -> list[float]:
    """From now on: of every average of the first momentum, the share of coordinates that lands beyond C sqrt(v)."""
    averaging, beyond = optimizer.averaging, []
    own, (state,) = averaging.receive, optimizer.state.values()

    def receive(cohort: Any, states: Any, means: Any) -> None:
        own(cohort, states, means)
        if "exp_avg" in means:
            beyond.append(
                float((state["exp_avg"].abs() > 1.0001 * bound * state[SECOND_MOMENT].sqrt()).double().mean())
            )
        if keep == "raise":
            state[SECOND_MOMENT].copy_(torch.maximum(state[SECOND_MOMENT], (state["exp_avg"] / bound).square()))

    averaging.receive = receive
    if keep != "hold":
        averaging.bounds = lambda group, steps: ()
    return beyond


def train(task: str, method: str, seed: int) -> dict[str, Any]:
    """Losses of the replicas' mean, how far the farthest coordinate went in each step, in units of the rate, bytes of a
    replica, and the share of coordinates that ``watch`` finds."""
    torch.set_num_threads(1)
    what, how = TASKS[task], METHODS[method]
    objective, rare = what.objective(seed)
    (beta, beta2), every = (
        what.betas,
        {PARAMS: PERIOD, "exp_avg": how.first * PERIOD, SECOND_MOMENT: how.second * PERIOD},
    )
    params = {"rule": how.rule, "lr": what.lr, "betas": what.betas, "sync_every": every}
    config = {"optimizer": {"params": params}, "deslo": {"synchronous_steps": what.steps * how.synchronous}}
    bound, rate = (1 - beta) / math.sqrt((1 - beta2) * (1 - beta**2 / beta2)), warmup_cosine(what.steps)
    moves, before, now, beyond = [], objective.start, objective.start[None], []
    try:
        for moment in simulate(
            objective, config, replicas=what.replicas, steps=what.steps, rate=rate, norm_clip=NORM_CLIP
        ):
            world = moment.replicas
            if moment.steps == 1 and how.rule == "adam":
                beyond = watch(world.optimizer, how.keep, bound)
            now = world.state(PARAMS)
            moves.append(float((now - before).abs().max()) / (what.lr * rate(moment.steps - 1)))
            before = now
    except NonFiniteError:
        moves.append(math.inf)
    losses = [float(each.evaluate(now.mean(0, keepdim=True))) for each in (objective, rare) if each]
    return {
        "seed": seed,
        "losses": losses,
        "moves": [round(each, 2) for each in moves],
        "bytes": sum(world.optimizer.stats.bytes.values()),
        "beyond": statistics.mean(beyond) if beyond else 0.0,
    }


def table(task: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Means over seeds, and ranges where they tell."""
    judged = ["loss at the end", "of what is rare"][: len(next(iter(runs.values()))[0]["losses"])]
    columns = [task, *judged, "farthest step of a weight / rate", "lands beyond C sqrt(v)", "MB sent by a replica"]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name, each in runs.items():
        losses = [[run["losses"][index] for run in each] for index in range(len(judged))]
        lines.append(
            [
                name,
                *(f"{statistics.mean(one):.4g} ({min(one):.4g} to {max(one):.4g})" for one in losses),
                f"{max(max(run['moves']) for run in each):,.0f}",
                f"{100 * max(run['beyond'] for run in each):.2g}%",
                f"{statistics.mean(run['bytes'] for run in each) / 1e6:.3g}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: Mapping[str, Any]) -> None:
    """The farthest step of a weight over the steps of the first seed, a panel for each task."""
    import matplotlib.pyplot as plt

    shown = {"Local Adam, 1x/1x/1x": "#3b6ea8", "1x/3x/6x as printed": "#c0392b", "(a) 1x/3x/6x, u held": "#1e8449"}
    figure, panels = plt.subplots(1, len(DRAWN), figsize=(11, 3.4), sharey=True, layout="constrained")
    for panel, task in zip(panels, DRAWN):
        runs = results[task]
        for name, color in shown.items():
            moves = runs[name][0]["moves"]
            panel.semilogy(range(1, len(moves) + 1), moves, color=color, label=name, linewidth=0.9)
        panel.set(title=task, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("farthest step of a weight / rate")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(FIGURE, dpi=130)


def run_all(processes: int) -> dict[str, Any]:
    """Every method on every task with every seed, as it is written down."""
    jobs = [(task, method, seed) for seed in SEEDS for task in TASKS for method in METHODS]
    results: dict[str, dict[str, list]] = {task: {method: [] for method in METHODS} for task in TASKS}
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    with pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        futures = {pool.submit(train, *job): job for job in jobs}
        for future in as_completed(futures):
            task, method, _ = futures[future]
            results[task][method].append(future.result())
            progress.advance(bar)
    for runs in results.values():
        for each in runs.values():
            each.sort(key=lambda run: run["seed"])
    setting = {
        "replicas": REPLICAS,
        "period": PERIOD,
        "norm_clip": NORM_CLIP,
        "tasks": {
            name: {"steps": task.steps, "lr": task.lr, "betas": task.betas, "replicas": task.replicas}
            for name, task in TASKS.items()
        },
    }
    return {
        "command": shlex.join(["python", "-m", "benchmarks.simulation.rare", *sys.argv[1:]]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "setting": setting,
        "runs": results,
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--show", action="store_true", help="run nothing: tables and figure of what is there")
    args = parser.parse_args()

    if not args.show:
        RESULTS.write_text(json.dumps(run_all(args.processes)) + "\n")
    results = json.loads(RESULTS.read_text())["runs"]
    draw(results)
    print("\n\n".join(table(task, runs) for task, runs in results.items()))


if __name__ == "__main__":
    main()
