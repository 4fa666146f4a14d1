"""Who takes part, and from when: called before every step with (completed steps, replicas)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from deslo_plugin.config.reader import Reader
from deslo_plugin.simulation.replicas import Replicas

Membership = Callable[[int, Replicas], object]


def constant(steps: int, replicas: Replicas) -> None:
    """Nobody comes or goes."""


@dataclass(frozen=True)
class Growth:
    """``count`` replicas join after ``at`` steps, with the mean of everything, or of parameters alone.

    Raises ``ConfigError`` unless both are whole numbers >= 1.
    """

    at: int
    count: int
    momenta: bool = True

    def __post_init__(self) -> None:
        given = Reader("Growth", asdict(self))
        given.positive_int("at"), given.positive_int("count")

    def __call__(self, steps: int, replicas: Replicas) -> None:
        if steps == self.at:
            first = 1 + max([*replicas.ids, *replicas.away])
            replicas.join(range(first, first + self.count), momenta=self.momenta)


@dataclass(frozen=True)
class Failures:
    """After every ``every`` steps, ``share`` of the replicas that are there fail, and lose all they had.

    At least one fails, and at least one stays. A replica that has been absent for ``absent`` steps or more comes back
    when parameters are next averaged, with the mean of everything, or of parameters alone. Who fails is drawn from
    ``seed``, alike for every algorithm.

    Raises ``ConfigError`` unless ``every`` and ``absent`` are whole numbers >= 1, and ``share`` lies between 0 and 1.
    """

    every: int
    share: float
    absent: int
    momenta: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        given = Reader("Failures", asdict(self))
        given.positive_int("every"), given.positive_int("absent")
        if not given.number("share", below=1.0):
            given.refuse("share", "a number > 0", "0", "leave failures out if none are wanted")

    def __call__(self, steps: int, replicas: Replicas) -> None:
        healed = [replica for replica, since in replicas.away.items() if steps - since >= self.absent]
        if healed and replicas.meets(steps):
            replicas.join(healed, momenta=self.momenta)
        if steps and steps % self.every == 0:
            here, generator = replicas.ids, torch.Generator().manual_seed(1_000_003 * self.seed + steps)
            count = min(max(1, round(self.share * len(here))), len(here) - 1)
            replicas.leave(here[index] for index in torch.randperm(len(here), generator=generator)[:count])
