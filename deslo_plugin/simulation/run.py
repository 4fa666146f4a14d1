"""The training loop of a simulation, one step at a time: whoever iterates decides what to look at, and when to stop."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deslo_plugin.config.load import load_config
from deslo_plugin.config.schema import Config
from deslo_plugin.config.switch import refuse_after_the_end
from deslo_plugin.simulation.membership import Membership, constant
from deslo_plugin.simulation.objectives import Objective
from deslo_plugin.simulation.replicas import Replicas


class SimulationStep(NamedTuple):
    """The world after ``steps`` steps. ``losses`` (M,) are what the replicas saw in the last of them, before it."""

    steps: int
    losses: Tensor
    replicas: Replicas


def simulate(
    objective: Objective,
    config: Config | Mapping[str, Any] | str | Path,
    *,
    replicas: int,
    steps: int,
    membership: Membership = constant,
    rate: Callable[[int], float] = lambda step: 1.0,
    norm_clip: float | None = None,
) -> Iterator[SimulationStep]:
    """Trains ``replicas`` replicas for ``steps`` steps and yields the world after each of them.

    Args:
        objective: what they minimise.
        config: both blocks, as ``DesLoc`` takes them; ``deslo.synchronous_steps`` of ``steps`` or more is the
        synchronous
            run that others are compared with.
        membership: called before every step with (completed steps, replicas); lets replicas join and leave.
        rate: multiplies ``optimizer.params.lr`` at step 0, 1, ...
        norm_clip: bound on the norm of each replica's own gradient.

    Raises ``ConfigError`` for a config that cannot be meant, ``NonFiniteError`` when an average meets NaN or inf.
    """
    config = load_config(config)
    refuse_after_the_end(config, steps, "--steps")
    world = Replicas(objective.start, config, replicas)
    for step in range(steps):
        membership(step, world)
        x = world.state("params").requires_grad_()
        losses = objective.losses(x, world.ids, step)
        (gradients,) = torch.autograd.grad(losses.sum(), x)
        world.step(gradients, rate=rate(step), norm_clip=norm_clip)
        yield SimulationStep(step + 1, losses.detach(), world)


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """A ``rate`` as in configs/: linear over the first twentieth of ``steps``, then a cosine to a tenth."""
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))

    return rate
