"""Who takes part, and from when: called before every step with (completed steps, replicas)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deslo_plugin.simulation.replicas import Replicas

Membership = Callable[[int, Replicas], object]


def constant(steps: int, replicas: Replicas) -> None:
    """Nobody comes or goes."""


@dataclass(frozen=True)
class Growth:
    """``count`` replicas join after ``at`` steps, with the mean of everything, or of parameters alone."""

    at: int
    count: int
    momenta: bool = True

    def __call__(self, steps: int, replicas: Replicas) -> None:
        if steps == self.at:
            first = 1 + max([*replicas.ids, *replicas.away])
            replicas.join(range(first, first + self.count), momenta=self.momenta)


@dataclass(frozen=True)
class Failures:
    """After every ``every`` steps, ``share`` of the replicas that are there fail, one at least, and lose all they had.

    A replica that has been absent for ``absent`` steps or more comes back when parameters are next averaged, with the mean
    of everything, or of parameters alone. Who fails is drawn from ``seed``, alike for every algorithm.
    """

    every: int
    share: float
    absent: int
    momenta: bool = True
    seed: int = 0

    def __call__(self, steps: int, replicas: Replicas) -> None:
        healed = [replica for replica, since in replicas.away.items() if steps - since >= self.absent]
        if healed and replicas.meets(steps):
            replicas.join(healed, momenta=self.momenta)
        if steps and steps % self.every == 0:
            here, generator = replicas.ids, torch.Generator().manual_seed(1_000_003 * self.seed + steps)
            failing = torch.randperm(len(here), generator=generator)[: max(1, round(self.share * len(here)))]
            replicas.leave(here[index] for index in failing)
