"""A period that follows the drift it finds (ours; an open question of arXiv 2505.22549 and 2510.05361, off by default).

An average of a state costs the same bytes whatever it finds, so that what a byte buys is the drift that the average
removes,

    d = sqrt(E_m ||s_m - E_m[s]||^2) / ||E_m[s]||          over all of a replica's shards of one param group

and a period is right where its averages find neither much more nor much less than was asked for:

    K <- K / 2   if d > drift          it came late
    K <- 2 K     if d < drift / 2      it came early, and 2 K steps are complete together now

With K in {min, 2 min, 4 min, ..., max} and min a multiple of the parameters' period, an average is due where t % K ==
0, as with fixed periods, and averages of different states still fall together. Where drift grows no faster than K, a
period that has become right stays. What decides is a mean over replicas (``spread``), the same on every rank of every
replica."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from deslo_plugin.algorithm.schedule import Periods
from deslo_plugin.algorithm.state_names import PARAMS


@dataclass(frozen=True)
class Adaptive:
    """Bounds on a period, in steps, and the drift (>= 0) that its averages should find; ``max`` is ``min`` times a
    power of 2."""

    min: int
    max: int
    drift: float

    def __str__(self) -> str:
        return f"adaptive, every {self.min} to {self.max} steps for drift {self.drift:g}"

    def allowed(self, period: int) -> int:
        """The longest period on offer that is not above ``period``, or the shortest one: after a load, bounds may be
        others."""
        longest = self.max
        while longest > max(period, self.min):
            longest //= 2
        return longest

    def after(self, steps: int, period: int, drift: float) -> int:
        """The period from now on, once an average after ``steps`` steps has found ``drift``."""
        if drift > self.drift:
            return max(period // 2, self.min)
        if drift < self.drift / 2 and steps % (2 * period) == 0:
            return min(2 * period, self.max)
        return period


Schedule = Mapping[str, int | None | Adaptive]
"""Periods as they are configured: of those that are adaptive, the bounds."""


def params_period(schedule: Schedule) -> int:
    """The parameters' own, a number in every config."""
    return cast(int, schedule[PARAMS])


def adaptive(schedule: Schedule) -> dict[str, Adaptive]:
    """The states whose periods adapt."""
    return {state: period for state, period in schedule.items() if isinstance(period, Adaptive)}


def written(schedule: Schedule) -> dict[str, int | str | None]:
    """As JSON holds it: of those that adapt, the bounds in words."""
    return {state: str(period) if isinstance(period, Adaptive) else period for state, period in schedule.items()}


def shortest(schedule: Schedule) -> Periods:
    """Every period at its shortest, where each starts."""
    return {state: period.min if isinstance(period, Adaptive) else period for state, period in schedule.items()}


def longest(schedule: Schedule) -> Periods:
    """Every period at its longest."""
    return {state: period.max if isinstance(period, Adaptive) else period for state, period in schedule.items()}
