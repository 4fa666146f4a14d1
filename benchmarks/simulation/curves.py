"""The figures of docs/robustness.md."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    "DES-LOC": "#0072b2",
    "Local Adam": "#e69f00",
    "FAVG+OPT": "#d55e00",
    "FAVG-OPT": "#cc79a7",
    "synchronous": "#555555",
    "DES-LOC, joiners without momenta": "#56b4e9",
    "DES-LOC, nobody joins": "#009e73",
    "DES-LOC, nobody fails": "#009e73",
    "DES-LOC, 4 from the start": "#0072b2",
    "DES-LOC, 1 until step 128": "#d55e00",
}
LABELS = ("held-out loss, nats per byte", "difference from DES-LOC, nats per byte")


def file_name(title: str) -> str:
    return "-".join(re.findall(r"\w+", title.lower().replace("%", " percent"))) + ".png"


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """One PNG for each experiment: the held-out loss, and its distance from the first run's, seed by seed.

    The synchronous run has a curve on the left only: on the right it would leave no room for the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for title, runs in results.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        first = np.array([curve["held_out"] for curve in next(iter(runs.values()))["curves"]])
        for name, each in runs.items():
            steps = np.array(each["curves"][0]["steps"])
            losses = np.array([curve["held_out"] for curve in each["curves"]])
            style = {"color": COLOURS[name], "label": name, "linestyle": "--" if "nobody" in name else "-"}
            _band(left, steps, losses, style)
            if name != "synchronous":
                late = len(steps) // 8
                _band(right, steps[late:], (losses - first)[:, late:], style)
        left.set_ylim(top=np.quantile(first, 0.96))
        for axes, label in zip((left, right), LABELS):
            if growth := max(each["run"]["scene"]["growth"] or 0 for each in runs.values()):
                axes.axvline(growth, color="black", linewidth=0.8, linestyle=":")
                axes.annotate(" they join", (growth, 0.02), xycoords=("data", "axes fraction"), fontsize="small")
            axes.set(xlabel="steps", ylabel=label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize="small"
        )
        figure.suptitle(f"{title}: mean of {len(first)} seeds, bands from lowest to highest", fontsize="medium")
        figure.savefig(folder / file_name(title), dpi=110)
        plt.close(figure)


def _band(axes: Axes, steps: np.ndarray, curves: np.ndarray, style: Mapping[str, Any]) -> None:
    axes.plot(steps, curves.mean(0), linewidth=1.4, **style)
    axes.fill_between(steps, curves.min(0), curves.max(0), color=style["color"], alpha=0.15, linewidth=0)
