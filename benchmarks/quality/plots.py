"""The figures of docs/results-without-switch.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks.quality.choice import at_best_rate
from benchmarks.quality.findings import STARTS
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.methods import METHODS, Preset, Run

FIGURES = ("curves", "bytes")
STYLES = {  # colours tell algorithms apart, lines rules
    "synchronous AdamW": ("#000000", "-", "o"),
    "synchronous ADOPT": ("#000000", "--", "s"),
    "synchronous QH": ("#777777", "-", "o"),
    "synchronous QH, ADOPT": ("#777777", "--", "s"),
    "Local Adam": ("#e69f00", "-", "o"),
    "Local ADOPT": ("#e69f00", "--", "s"),
    "FAVG+OPT": ("#d55e00", "-", "o"),
    "FAVG-OPT": ("#cc79a7", "-", "o"),
    "DiLoCo": ("#8c564b", "-", "o"),
    "DES-LOC-Nesterov": ("#56b4e9", "-", "o"),
    "DES-LOC": ("#0072b2", "-", "o"),
    "DES-LOC-QH": ("#0072b2", "--", "s"),
    "MT-DAO": ("#009e73", "-", "o"),
    "MT-DAO, ADOPT": ("#009e73", "--", "s"),
    "MT-DAO, two momenta": ("#6a3d9a", "-", "o"),
}
CLOCK_STYLES = {
    "DDP": ("#000000", "-"),
    "Accelerate LocalSGD": ("#d55e00", ":"),
    "torch PostLocalSGD": ("#d55e00", "--"),
    **{name: STYLES[name][:2] for name in ("Local Adam", "DES-LOC", "DES-LOC-QH", "MT-DAO, two momenta")},
}


def draw(preset: Preset, ledger: Ledger, folder: Path, name: str) -> None:
    """Validation loss against steps, and at the end against bytes: every method at its best rate, mean of all seeds
    (bars: lowest to highest)."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = at_best_rate(preset, ledger)
    for kind, panel, label in zip(FIGURES, (_curve, _point), ("steps", "MB sent by a replica")):
        figure, (panels,) = plt.subplots(
            1, len(preset.starts), figsize=(11, 4.6), layout="constrained", sharey=True, squeeze=False
        )
        for axes, warm_up in zip(panels, preset.starts):
            for each, method in METHODS.items():
                panel(axes, each, chosen[each, warm_up and not method.synchronous], ledger)
            axes.set(title=STARTS[warm_up], xlabel=label)
            _plain(axes)
        panels[0].set_ylabel("validation loss, nats per byte")
        names = panels[0].get_legend_handles_labels()
        figure.legend(*names, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
        figure.savefig(folder / file(name, kind), dpi=90)
        plt.close(figure)


def file(preset: str, kind: str) -> str:
    return f"quality-{preset}-{kind}.png"


def _curve(axes: Axes, name: str, runs: Sequence[Run], ledger: Ledger) -> None:
    colour, line, _ = STYLES[name]
    losses = np.array([ledger[each]["validation"] for each in runs], dtype=float).mean(0)
    axes.plot(ledger[runs[0]]["steps"][1:], losses[1:], color=colour, linestyle=line, label=name, linewidth=1.4)


def _point(axes: Axes, name: str, runs: Sequence[Run], ledger: Ledger) -> None:
    colour, _, marker = STYLES[name]
    ends = np.array([ledger.final(each) for each in runs], dtype=float)
    spread = [[ends.mean() - ends.min()], [ends.max() - ends.mean()]]
    sent = ledger[runs[0]]["bytes"] / 1e6
    axes.errorbar(sent, ends.mean(), yerr=spread, color=colour, marker=marker, label=name, linestyle="", capsize=2)


def clock_figure(curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], path: Path) -> None:
    """Validation loss against seconds of training, a panel for each rate of the link."""
    figure, (panels,) = plt.subplots(
        1, len(curves), figsize=(11, 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (rate, named) in zip(panels, curves.items()):
        for name, curve in named.items():
            colour, line = CLOCK_STYLES[name]
            axes.plot(
                curve["seconds"][1:], curve["losses"][1:], color=colour, linestyle=line, label=name, linewidth=1.4
            )
        axes.set(title=rate, xlabel="seconds of training", xscale="log")
        axes.set_xticks((2, 5, 10, 20, 50, 100), minor=False)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        _plain(axes)
    panels[0].set_ylabel("validation loss, nats per byte")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
