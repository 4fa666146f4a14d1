"""The toy problem of DES-LOC (arXiv 2505.22549, Fig. 2), simulated: 256 replicas on Rosenbrock's function under noise.

    OMP_NUM_THREADS=1 python benchmarks/toy.py

Writes benchmarks/results/toy.json and docs/figures/toy.png. The paper gives the function, 256 workers, the noise (sigma 1.5
for all; or, non-IID, a deviation for each worker drawn from N(0, 3)) and the periods; rate, betas and start are ours.
"""

import json
import platform
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from curves import COLOURS
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deslo_plugin.simulation import Rosenbrock, simulate
from deslo_plugin.simulation.objectives import normal

HERE = Path(__file__).resolve().parent
RESULTS, FIGURE = HERE / "results" / "toy.json", HERE.parent / "docs" / "figures" / "toy.png"
REPLICAS, STEPS, LOOK, SEEDS = 256, 7680, 16, [0, 1, 2]
START, LR, BETAS = [-1.2, 1.0], 0.01, [0.9964, 0.999]  # half-lives 192 and 693
ALGORITHMS = {
    "DES-LOC": {"sync_every": {"params": 192, "exp_avg": 192, "exp_avg_sq": 692}},
    "Local Adam": {"sync_every": {"params": 192, "exp_avg": 192, "exp_avg_sq": 192}},
    "FAVG+OPT": {"sync_every": {"params": 192, "exp_avg": None, "exp_avg_sq": None}},
    "FAVG-OPT": {"sync_every": {"params": 192, "exp_avg": None, "exp_avg_sq": None}, "reset_momenta": True},
}
NOISES = {"noise of deviation 1.5 on every replica": 1.5, "deviations drawn from N(0, 3)": 3.0}


def curve(name: str, noise: str, seed: int) -> list[float]:
    """f at the mean of the replicas' parameters, every 16 steps."""
    sigma = torch.full((REPLICAS,), 1.5) if NOISES[noise] == 1.5 else NOISES[noise] * normal(seed, -3, REPLICAS).abs()
    objective = Rosenbrock(torch.tensor(START), sigma, replicas=REPLICAS, seed=seed)
    config = {"optimizer": {"params": {"lr": LR, "betas": BETAS} | ALGORITHMS[name]}}
    return [
        float(objective.evaluate(moment.replicas.state("params").mean(0, keepdim=True)))
        for moment in simulate(objective, config, replicas=REPLICAS, steps=STEPS) if moment.steps % LOOK == 0
    ]


def shown(results: dict[str, Any]) -> Table:
    """Of the second half of every run: the median and the highest value, mean over seeds."""
    table = Table("", "", "median of the second half", "highest of the second half", title=f"{STEPS} steps, {len(SEEDS)} seeds")
    for noise, algorithms in results.items():
        for name, curves in algorithms.items():
            halves = [each[len(each) // 2 :] for each in curves]
            table.add_row(noise, name, *(f"{statistics.mean(map(of, halves)):.1e}" for of in (statistics.median, max)))
    return table


def draw(results: dict[str, Any]) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for axes, (noise, algorithms) in zip(panels, results.items()):
        for name, curves in algorithms.items():
            values = torch.tensor(curves).log().mean(0).exp()
            axes.semilogy(range(LOOK, STEPS + 1, LOOK), values, color=COLOURS[name], label=name, linewidth=1.2,
                          linestyle="--" if name == "Local Adam" else "-")
        axes.set(title=noise, xlabel="steps")
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("f at the mean of 256 replicas")
    panels[0].legend(frameon=False, fontsize="small")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {noise: {name: [] for name in ALGORITHMS} for noise in NOISES}
    runs = [(noise, name, seed) for noise in NOISES for name in ALGORITHMS for seed in SEEDS]
    for noise, name, seed in track(runs, console=Console(stderr=True)):
        results[noise][name].append([float(f"{value:.4g}") for value in curve(name, noise, seed)])
    head = {"command": "python benchmarks/toy.py", "torch": torch.__version__, "machine": platform.machine(),
            "replicas": REPLICAS, "lr": LR, "betas": BETAS, "start": START, "algorithms": ALGORITHMS, "every": LOOK}
    RESULTS.write_text(json.dumps(head | {"f": results}) + "\n")
    draw(results)
    Console(width=130).print(shown(results))


if __name__ == "__main__":
    main()
