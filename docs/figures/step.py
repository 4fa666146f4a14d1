"""Draws step.png: two replicas, four steps, and the average that travels under one of them. Needs matplotlib."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

COMPUTE, UPDATE, TRAVEL, TEXT = "#4c78a8", "#54a24b", "#f58518", "#222222"
STEP, FORWARD = 2.5, 1.6


def box(axes, x, y, width, color, text, height=0.5):
    style = "round,pad=0,rounding_size=0.05"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, text, color="white", ha="center", va="center", fontsize=8.5)


def arrow(axes, start, end):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=TRAVEL, linewidth=1.4))


figure, axes = plt.subplots(figsize=(10, 3.7))
for index in range(4):
    left = index * STEP
    axes.text(left + STEP / 2 - 0.1, 4.05, f"step {31 + index}", ha="center", fontsize=10, color=TEXT)
    axes.axvline(left - 0.07, 0.13, 0.93, color="#dddddd", linewidth=0.8, zorder=0)
    for row in (3.3, 0.9):
        box(axes, left, row, FORWARD, COMPUTE, "forward, backward")
        box(axes, left + FORWARD + 0.04, row, STEP - FORWARD - 0.18, UPDATE, "step()")
start, end = 2 * STEP - 0.1, 2 * STEP + FORWARD + 0.1
box(axes, start + 0.15, 2.1, end - start - 0.35, TRAVEL, "mean of params")
for row, edge in ((3.3, 2.6), (1.4, 2.1)):
    arrow(axes, (start - 0.1, row), (start + 0.2, edge))
    arrow(axes, (end - 0.25, edge), (end + 0.1, row))
axes.text(
    start - 0.25, 2.35, "launch: copies, as they are\nafter step 32", ha="right", va="center", fontsize=9, color=TEXT
)
axes.text(
    end + 0.2,
    2.35,
    "land: x becomes the mean,\nthen takes its own update",
    ha="left",
    va="center",
    fontsize=9,
    color=TEXT,
)
for row, name in ((3.55, "replica 0"), (2.35, "slow link"), (1.15, "replica 1")):
    axes.text(-0.25, row, name, ha="right", va="center", fontsize=10, color=TEXT)
axes.text(
    0,
    0.35,
    "K = 32 for params: nothing else is due here. exp_avg (K = 96) goes the same way after step 96, exp_avg_sq (K = "
    "192) after step 192.\nAll other steps send nothing between replicas.",
    fontsize=9,
    color=TEXT,
    va="center",
)
axes.set(xlim=(-1.6, 4 * STEP), ylim=(0, 4.4))
axes.axis("off")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=130, bbox_inches="tight")
