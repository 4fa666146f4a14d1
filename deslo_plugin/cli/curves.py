"""Losses over steps, one line for each algorithm with a band over seeds."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from deslo_plugin.simulation.comparison import Curve
from deslo_plugin.simulation.settings import SimulationConfig

SMOOTH = 40  # points show means over a 40th of the run: single losses are noisy
COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73", "#56b4e9", "#555555")
STYLES = ("-", "--", "-", "-.")  # neighbours that lie on each other are both seen


def draw(scene: SimulationConfig, results: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Writes the figure: the middle seed's loss at each step, the band from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, curves), colour, style in zip(results.items(), cycle(COLOURS), cycle(STYLES)):
        points = min(len(curve.steps) for curve in curves)
        if not points:
            continue
        width = min(points, max(1, scene.steps // scene.looks // SMOOTH))
        losses = torch.stack([smooth(curve.losses[:points], width, scene.logarithmic) for curve in curves])
        steps, ended = (
            curves[0].steps[width - 1 : points],
            " (diverged)" * any(curve.diverged is not None for curve in curves),
        )
        axes.plot(steps, losses.quantile(0.5, 0), color=colour, linestyle=style, linewidth=1.4, label=name + ended)
        axes.fill_between(steps, losses.amin(0), losses.amax(0), color=colour, alpha=0.15, linewidth=0)
    if scene.double_at is not None:
        axes.axvline(scene.double_at, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="steps",
        ylabel=f"loss at the mean of {scene.replicas} replicas",
        yscale="log" if scene.logarithmic else "linear",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def smooth(losses: Sequence[float], width: int, logarithmic: bool) -> Tensor:
    """Running means of ``width`` losses, geometric ones where they run over orders of magnitude: (len - width + 1,)
    float64."""
    values = torch.tensor(losses, dtype=torch.float64)
    if not logarithmic:
        return values.unfold(0, width, 1).mean(1)
    return values.clamp_min(torch.finfo(torch.float32).tiny).log().unfold(0, width, 1).mean(1).exp()
