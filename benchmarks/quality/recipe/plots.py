"""The figure of docs/results.md: what is lost against synchronous training, over what is sent."""

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks.quality.recipe.methods import BUDGET, METHODS, RECIPE
from benchmarks.quality.recipe.parts import FIRST, Runs, best, one_rate
from benchmarks.quality.recipe.settings import SETTINGS
from benchmarks.quality.recipe.tables import ENDED, at, reference

FIGURE = "recipe-bytes.png"
COLOURS = {"synchronous": "#000000", "MT-DAO": "#009e73", "DES-LOC": "#0072b2", "Local": "#e69f00", "FAVG": "#d55e00"}


def draw(runs: Runs, folder: Path) -> None:
    """Perplexity above synchronous ADOPT's of the same seed, at a constant rate and after the decay: mean, and bars
    from lowest to highest."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    setting = SETTINGS[FIRST]
    for axes, moment in zip(panels, ENDED):
        base = reference(runs, FIRST, moment)
        for name in (*RECIPE, *BUDGET):
            lr = best(runs, FIRST, name).get(moment, one_rate(FIRST)) if name in RECIPE else one_rate(FIRST)
            percent = [math.expm1(nats - base[seed]) * 100 for seed, nats in at(runs, FIRST, name, lr, moment).items()]
            if not percent:
                continue
            sent = at(runs, FIRST, name, lr, "sent") or {0: float(setting.steps - setting.switch)}
            middle, x = statistics.mean(percent), statistics.mean(sent.values())
            ends = [[middle - min(percent)], [max(percent) - middle]]
            colour = next(colour for start, colour in COLOURS.items() if name.startswith(start))
            axes.errorbar(x, middle, ends, fmt="o" if METHODS[name].wire is None else "D", color=colour, capsize=3)
            axes.annotate(name, (x, middle), xytext=(5, 3), textcoords="offset points", fontsize=7, color=colour)
        axes.axhline(0, color="#000000", linewidth=0.8)
        axes.set(
            xscale="log",
            xlim=(25, 5000),
            title=moment,
            xlabel="float32 vectors of the model that a replica sends after the switch",
        )
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity above synchronous ADOPT, %")
    figure.savefig(folder / FIGURE, dpi=110)
    plt.close(figure)
