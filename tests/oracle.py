"""M replicas in one process, in float64, from the papers alone: what every implementation is held against.

Imports nothing of the package. One parameter vector per replica; gradients come from a function of (replica, step, x).
Equation numbers: DES-LOC, arXiv 2505.22549; MT-DAO, arXiv 2510.05361.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Gradient = Callable[[int, int, Tensor], Tensor | None]


@dataclass
class Setting:
    """One algorithm. ``periods`` has keys "x", "u1", "u2", ..., "v"; None = never."""

    rule: str
    periods: dict[str, int | None]
    betas: list[float]
    weights: list[float]
    beta2: float = 0.95
    eps: float = 1e-8
    lr: float = 1e-2
    weight_decay: float = 0.0
    bias_correction: bool = True
    value_clip: float | None = None
    norm_clip: float | None = None
    after_update: bool = False
    reset: bool = False
    outer: tuple[float, float] | None = None  # (outer lr, momentum)


@dataclass
class Replica:
    x: Tensor
    u: list[Tensor]
    v: Tensor
    updates: int = 0  # made by the rule since the start, or since the last reset
    anchor: Tensor = field(default_factory=lambda: torch.empty(0))
    momentum: Tensor = field(default_factory=lambda: torch.empty(0))


def train(setting: Setting, x0: Tensor, replicas: int, steps: int, gradient: Gradient) -> list[Replica]:
    """Runs Algorithm 1 and returns the replicas. A gradient of None is a step that this replica skips."""
    s = setting
    start = x0.to(torch.float64)
    zeros = torch.zeros_like(start)
    world = [
        Replica(start.clone(), [zeros.clone() for _ in s.betas], zeros.clone(), 0, start.clone(), zeros.clone())
        for _ in range(replicas)
    ]
    for t in range(steps):
        gradients = [gradient(m, t, world[m].x) for m in range(replicas)]  # at the un-averaged parameters
        if not s.after_update:
            _average(world, s, t)
        for replica, g in zip(world, gradients):
            if g is not None:
                _update(replica, s, _clip(g.to(torch.float64), s))
        if s.after_update:
            _average(world, s, t + 1)
    return world


def _clip(g: Tensor, s: Setting) -> Tensor:
    if s.norm_clip is not None:
        g = g * min(1.0, s.norm_clip / (float(g.norm()) + 1e-6))
    return g if s.value_clip is None else g.clamp(-s.value_clip, s.value_clip)


def _average(world: list[Replica], s: Setting, t: int) -> None:
    def due(key: str) -> bool:
        return t > 0 and s.periods.get(key) is not None and t % s.periods[key] == 0

    def mean(of: Callable[[Replica], Tensor]) -> Tensor:
        return torch.stack([of(replica) for replica in world]).mean(0)

    if due("x"):
        average = mean(lambda r: r.x)
        for replica in world:
            if s.outer:
                lr, beta = s.outer
                progress = replica.anchor - average
                replica.momentum = beta * replica.momentum + progress
                replica.anchor = replica.anchor - lr * (progress + beta * replica.momentum)
                replica.x = replica.anchor.clone()
            else:
                replica.x = average.clone()
            if s.reset:
                replica.u = [torch.zeros_like(u) for u in replica.u]
                replica.v, replica.updates = torch.zeros_like(replica.v), 0
    for j in range(len(s.betas)):
        if due(f"u{j + 1}"):
            average = mean(lambda r: r.u[j])
            for replica in world:
                replica.u[j] = average.clone()
    if due("v"):
        average = mean(lambda r: r.v)
        for replica in world:
            replica.v = average.clone()


def _update(r: Replica, s: Setting, g: Tensor) -> None:
    t, r.updates = r.updates, r.updates + 1
    if s.rule == "adopt" and t == 0:
        r.v = g * g
        return
    direction = g
    if s.rule == "adopt":
        direction = g / r.v.sqrt().clamp(min=s.eps)
        direction = direction.clamp(-(t**0.25), t**0.25)
    r.u = [beta * u + (1 - beta) * direction for u, beta in zip(r.u, s.betas)]
    momenta, denominator = r.u, torch.ones_like(r.x)
    if s.rule == "adam":
        r.v = s.beta2 * r.v + (1 - s.beta2) * g * g
        v = r.v
        if s.bias_correction:
            momenta = [u / (1 - beta ** (t + 1)) for u, beta in zip(r.u, s.betas)]
            v = r.v / (1 - s.beta2 ** (t + 1))
        denominator = v.sqrt() + s.eps
    d = (1 - sum(s.weights)) * direction + sum(w * u for w, u in zip(s.weights, momenta))
    r.x = (1 - s.lr * s.weight_decay) * r.x - s.lr * d / denominator
    if s.rule == "adopt":
        r.v = s.beta2 * r.v + (1 - s.beta2) * g * g
