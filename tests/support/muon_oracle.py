"""Muon on M replicas of one matrix, in float64, from its definition alone: what every implementation is held against.

Imports nothing of the package, and iterates on singular values, where the package multiplies matrices: what K. Jordan's
quintic makes of U S V^T is U q(S) V^T. Scales: Jordan's, and that of arXiv 2502.16982.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Numbers:
    """What the update of a matrix computes; periods of "x", "u1", "u2", ...; None = never."""

    periods: dict[str, int | None]
    betas: list[float]
    weights: list[float]  # what is left of 1 is the raw gradient's
    lr: float = 0.05
    weight_decay: float = 0.1
    rms: bool = True  # 0.2 sqrt(max(rows, columns)), else sqrt(max(1, rows / columns))
    after_update: bool = False
    outer: tuple[float, float] | None = None  # (outer lr, momentum)
    switch: tuple[int, list[float], list[float], float] | None = None  # at, betas, weights, rate x; all u reset


def quintic(d: Tensor, iterations: int = 5) -> Tensor:
    u, s, vt = torch.linalg.svd(d.double(), full_matrices=False)
    s = s / max(float(s.square().sum().sqrt()), 1e-7)
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def train(
    n: Numbers, start: Tensor, replicas: int, steps: int, gradient: Callable[[int, int, Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """Algorithm 1 of arXiv 2505.22549; per replica x and u1, u2, ... after ``steps`` steps."""
    x = [start.double().clone() for _ in range(replicas)]
    u = [[torch.zeros_like(x[0]) for _ in n.betas] for _ in range(replicas)]
    anchor, velocity = start.double().clone(), torch.zeros_like(x[0])
    betas, weights, lr = n.betas, n.weights, n.lr

    def average(now: int) -> None:
        nonlocal anchor, velocity
        due = {key for key, period in n.periods.items() if now > 0 and period and now % period == 0}
        if "x" in due:
            mean = sum(x) / replicas
            if n.outer is not None:
                velocity = n.outer[1] * velocity + (anchor - mean)
                anchor = anchor - n.outer[0] * ((anchor - mean) + n.outer[1] * velocity)
                mean = anchor
            x[:] = [mean.clone() for _ in x]
        for j in range(len(betas)):
            if f"u{j + 1}" in due:
                mean = sum(each[j] for each in u) / replicas
                for each in u:
                    each[j] = mean.clone()

    rows, columns = start.shape
    scale = 0.2 * max(rows, columns) ** 0.5 if n.rms else max(1.0, rows / columns) ** 0.5
    for t in range(steps):
        gradients = [gradient(m, t, x[m]).double() for m in range(replicas)]  # at parameters that are not averaged yet
        if not n.after_update:
            average(t)
        if n.switch is not None and t == n.switch[0]:
            _, betas, weights, factor = n.switch
            u, lr = [[torch.zeros_like(x[0]) for _ in betas] for _ in range(replicas)], n.lr * factor
        for m, g in enumerate(gradients):
            u[m] = [beta * each + (1 - beta) * g for each, beta in zip(u[m], betas)]
            d = (1 - sum(weights)) * g + sum(w * each for w, each in zip(weights, u[m]))
            x[m] = (1 - lr * n.weight_decay) * x[m] - lr * scale * quintic(d)
        if n.after_update:
            average(t + 1)
    return [{"x": x[m]} | {f"u{j + 1}": each for j, each in enumerate(u[m])} for m in range(replicas)]
