"""The toy problem of DES-LOC (arXiv 2505.22549, Fig. 2), simulated: 256 replicas on Rosenbrock's function under noise.

    OMP_NUM_THREADS=1 python -m benchmarks.simulation.toy

Writes benchmarks/results/toy.json and docs/figures/toy.png. The paper gives the function, 256 workers, the noise (sigma
1.5 for all; or, non-IID, a deviation for each worker drawn from N(0, 3)) and the periods; rates, betas and start are
ours, and stand in configs/toy/. ``deslo simulate`` makes one panel of the figure: docs/simulate.md.
"""

import json
import platform
import statistics
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track

from benchmarks.simulation.curves import COLOURS
from deslo_plugin.simulation import simulate
from deslo_plugin.simulation.comparison import follow, read_contestants
from deslo_plugin.simulation.settings import START, SimulationConfig

ROOT = Path(__file__).resolve().parents[2]
RESULTS, FIGURE = ROOT / "benchmarks" / "results" / "toy.json", ROOT / "docs" / "figures" / "toy.png"
REPLICAS, STEPS, LOOK, SEEDS = 256, 7680, 16, [0, 1, 2]
PERIOD = 192
ALGORITHMS = {
    "DES-LOC": "toy/des-loc",
    "Local Adam": "toy/local-adam",
    "FAVG+OPT": "toy/favg+opt",
    "FAVG-OPT": "toy/favg-opt",
}
SCENES = {  # -> rate, and how replicas' noise differs
    "rate 0.03, noise of deviation 1.5": (0.03, 0.0),
    "rate 0.01, noise of deviation 1.5": (0.01, 0.0),
    "rate 0.03, deviations drawn from N(0, 3)": (0.03, 3.0),
}


def curve(scene: str, name: str, seed: int, *, steps: int = STEPS) -> list[float]:
    """f at the mean of the replicas' parameters, every 16 steps."""
    lr, noniid = SCENES[scene]
    (contestant,) = read_contestants([str(ROOT / "configs" / f"{ALGORITHMS[name]}.json")], lr=lr)
    objective = SimulationConfig(replicas=REPLICAS, steps=steps, noniid=noniid).build(seed)
    moments = simulate(objective, contestant.config, replicas=REPLICAS, steps=steps)
    return follow(objective, moments, every=LOOK, seed=seed).losses


def table(scene: str, algorithms: dict[str, list[list[float]]]) -> str:
    """Of the last third of every run: median and highest value, geometric means over seeds, and the medians' range."""
    lines = [f"| {scene} | median of the last third | over seeds | highest of the last third |", "|---|---:|---:|---:|"]
    for name, curves in algorithms.items():
        thirds = [each[-len(each) // 3 :] for each in curves]
        medians = [statistics.median(third) for third in thirds]
        highest = statistics.geometric_mean(map(max, thirds))
        lines.append(
            f"| {name} | {statistics.geometric_mean(medians):.1e} | {min(medians):.1e} to {max(medians):.1e} "
            f"| {highest:.1e} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """One panel for each scene: geometric means of f over seeds and over one period of the parameters."""
    figure, panels = plt.subplots(1, len(SCENES), figsize=(11, 3.6), layout="constrained", sharey=True)
    for axes, (scene, algorithms) in zip(panels, results.items()):
        for name, curves in algorithms.items():
            smooth = torch.tensor(curves).log().mean(0).unfold(0, PERIOD // LOOK, 1).mean(1).exp()
            axes.semilogy(
                range(PERIOD, STEPS + 1, LOOK),
                smooth,
                color=COLOURS[name],
                label=name,
                linewidth=1.4,
                linestyle="--" if name == "Local Adam" else "-",
            )
        axes.set_title(scene, fontsize="medium")
        axes.set_xlabel("steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("f at the mean of 256 replicas")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()  # --help tells, and does not train
    torch.set_num_threads(1)
    results: dict[str, Any] = {scene: {name: [] for name in ALGORITHMS} for scene in SCENES}
    runs = [(scene, name, seed) for scene in SCENES for name in ALGORITHMS for seed in SEEDS]
    for scene, name, seed in track(runs, console=Console(stderr=True)):
        results[scene][name].append([float(f"{value:.3g}") for value in curve(scene, name, seed)])
    head = {
        "command": "python -m benchmarks.simulation.toy",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "replicas": REPLICAS,
        "start": START,
        "algorithms": ALGORITHMS,
        "scenes": SCENES,
        "every": LOOK,
    }
    RESULTS.write_text(json.dumps(head | {"f": results}) + "\n")
    draw(results)
    for scene, algorithms in results.items():
        print(table(scene, algorithms), end="\n\n")


if __name__ == "__main__":
    main()
