"""Replicas that join and replicas that fail, in simulation: DES-LOC against Local Adam, FAVG+OPT and synchronous
training.

    OMP_NUM_THREADS=1 python -m benchmarks.simulation.robustness [--processes 1]

Trains the byte-level GPT of examples/ in one process for each run, hyper-parameters from configs/, and writes
benchmarks/results/robustness.json and the figures of docs/robustness.md.
"""

import json
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.simulation.curves import draw
from benchmarks.simulation.small_gpt import GPTConfig, small_gpt
from deslo_plugin.config.file import read_file
from deslo_plugin.simulation import Failures, Growth, simulate, warmup_cosine
from deslo_plugin.simulation.membership import Membership, constant

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "robustness.json"
SHAPE = GPTConfig(dim=64, layers=2, heads=4, context=64)
SEQUENCES = 4  # of 64 bytes, for each replica and step
BETAS = {"short memory": [0.9, 0.95], "long memory": [0.9, 0.999]}  # as in configs/, and torch's own defaults
SHORTER = 4  # times, than in configs/: runs are short, and so are periods, 8 / 24 / 48
LOOK = 8  # steps between looks at the held-out loss
SEEDS = [0, 1, 2]


@dataclass(frozen=True)
class Scene:
    """What happens in a run of ``steps`` steps that ``replicas`` start; ``capacity`` ever take part."""

    replicas: int
    capacity: int
    steps: int
    growth: int | None = None  # steps after which the others join
    failures: tuple[int, float, int] | None = None  # every so many steps, this share, absent so long at least


@dataclass(frozen=True)
class Run:
    """One algorithm in one scene. ``momenta``: whether replicas that join receive momenta too."""

    config: str
    scene: Scene
    momenta: bool = True
    synchronous: bool = False
    betas: str = "short memory"


GROWS = Scene(replicas=4, capacity=8, steps=640, growth=320)
FAILS = Scene(replicas=20, capacity=20, steps=416, failures=(16, 0.05, 32))
STARTS = Scene(replicas=4, capacity=4, steps=320)


def algorithms(scene: Scene, betas: str = "short memory") -> dict[str, Run]:
    """Replicas of FAVG+OPT exchange parameters and nothing else, also when they join."""
    return {
        "DES-LOC": Run("des-loc-adam", scene, betas=betas),
        "Local Adam": Run("local-adam", scene, betas=betas),
        "FAVG+OPT": Run("favg+opt", scene, momenta=False, betas=betas),
        "synchronous": Run("des-loc-adam", scene, synchronous=True, betas=betas),
    }


def doubling(betas: str) -> dict[str, Run]:
    return algorithms(GROWS, betas) | {
        "DES-LOC, joiners without momenta": Run("des-loc-adam", GROWS, momenta=False, betas=betas),
        "DES-LOC, nobody joins": Run("des-loc-adam", replace(GROWS, growth=None), betas=betas),
    }


EXPERIMENTS = {
    "4 replicas become 8": doubling("short memory"),
    "4 replicas become 8, long memory": doubling("long memory"),
    "5% of 20 replicas fail every 16 steps": algorithms(FAILS)
    | {"DES-LOC, nobody fails": Run("des-loc-adam", replace(FAILS, failures=None))},
    "1 replica becomes 4": {
        "DES-LOC, 4 from the start": Run("des-loc-adam", STARTS),
        "DES-LOC, 1 until step 128": Run("des-loc-adam", replace(STARTS, replicas=1, growth=128)),
    },
}


def config_of(run: Run) -> tuple[dict[str, Any], float]:
    """The two blocks of a run, and the bound on a replica's gradient norm, from its file in configs/."""
    blocks = read_file(ROOT / "configs" / f"{run.config}.json")
    params = blocks["optimizer"]["params"] | {"betas": BETAS[run.betas]}
    params["sync_every"] = {state: every and every // SHORTER for state, every in params["sync_every"].items()}
    deslo = {"synchronous_steps": run.scene.steps} if run.synchronous else {}
    return {"optimizer": {"type": "DesLoc", "params": params}, "deslo": deslo}, blocks["gradient_clipping"]


def train(run: Run, seed: int) -> dict[str, Any]:
    """One run: every 8 steps the held-out loss of the replicas' mean, in nats, and how many replicas there were."""
    torch.set_num_threads(1)
    scene, (config, norm_clip) = run.scene, config_of(run)
    objective = small_gpt(SHAPE, sequences=SEQUENCES, replicas=scene.capacity, seed=seed, held_out=2)
    membership: Membership = constant
    if scene.growth:
        membership = Growth(scene.growth, scene.capacity - scene.replicas, run.momenta)
    elif scene.failures:
        membership = Failures(*scene.failures, momenta=run.momenta, seed=seed)
    steps, held_out, there = [], [], []
    for moment in simulate(
        objective,
        config,
        replicas=scene.replicas,
        steps=scene.steps,
        membership=membership,
        rate=warmup_cosine(scene.steps),
        norm_clip=norm_clip,
    ):
        if moment.steps % LOOK == 0:
            steps.append(moment.steps)
            there.append(len(moment.replicas.ids))
            mean = moment.replicas.state("params").mean(0, keepdim=True)
            held_out.append(round(float(objective.evaluate(mean)), 4))
    sent = sum(moment.replicas.optimizer.stats.bytes.values())
    return {"seed": seed, "steps": steps, "held_out": held_out, "replicas": there, "bytes_per_replica": sent}


def table(title: str, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Held-out losses at the end, and perplexities against the first run's, mean and range over seeds: as in the
    document."""
    first = next(iter(runs.values()))
    growth = max(each["run"]["scene"]["growth"] or 0 for each in runs.values())
    looks = {"a round after they join, %": growth // LOOK} if growth else {}
    columns = [title, "nats at the end", *(looks | {"perplexity at the end, %": -1}), "MB sent by a replica"]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name, each in runs.items():
        end = statistics.mean(curve["held_out"][-1] for curve in each["curves"])
        sent = max(curve["bytes_per_replica"] for curve in each["curves"]) / 1e6
        lines.append(
            [name, f"{end:.3f}", *(_against(each, first, look) for look in [*looks.values(), -1]), f"{sent:.1f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _against(each: Mapping[str, Any], first: Mapping[str, Any], look: int) -> str:
    """Perplexity at a look against the first run's, of the same seed: one look after the replicas joined is a round, K
    = 8."""
    pairs = zip(each["curves"], first["curves"])
    percent = [math.expm1(curve["held_out"][look] - base["held_out"][look]) * 100 for curve, base in pairs]
    return f"{statistics.mean(percent):+.1f} ({min(percent):+.1f} to {max(percent):+.1f})" if each is not first else ""


def run_all(args: Namespace) -> dict[str, Any]:
    """Every chosen experiment with every seed, as it is written to ``args.out``."""
    chosen = {title: EXPERIMENTS[title] for title in args.only}
    results = {
        title: {name: {"run": asdict(run), "curves": []} for name, run in runs.items()}
        for title, runs in chosen.items()
    }
    jobs = [(title, name, seed) for seed in args.seeds for title, runs in chosen.items() for name in runs]
    pool = ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn"))
    with pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        futures = {pool.submit(train, chosen[title][name], seed): (title, name) for title, name, seed in jobs}
        for future in as_completed(futures):
            title, name = futures[future]
            results[title][name]["curves"].append(future.result())
            progress.advance(bar)
    for runs in results.values():
        for each in runs.values():
            each["curves"].sort(key=lambda curve: args.seeds.index(curve["seed"]))

    command = shlex.join(["python", "-m", "benchmarks.simulation.robustness", *sys.argv[1:]])
    model = asdict(SHAPE) | {"parameters": small_gpt(SHAPE, sequences=1, replicas=1, seed=0).start.numel()}
    head = {
        "command": command,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "model": model,
        "sequences": SEQUENCES,
        "betas": BETAS,
        "periods": f"those of configs/ / {SHORTER}",
    }
    return head | {"experiments": results}


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(%(default)s)")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments (all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--show", action="store_true", help="run nothing: tables and figures of what --out holds")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", help="folder (%(default)s)")
    args = parser.parse_args()

    if not args.show:
        args.out.write_text(json.dumps(run_all(args)) + "\n")
    results = json.loads(args.out.read_text())["experiments"]
    draw(results, args.figures)
    for title, runs in results.items():
        print(table(title, runs), end="\n\n")


if __name__ == "__main__":
    main()
