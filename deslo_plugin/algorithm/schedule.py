"""When each state is averaged, and the arithmetic of half-lives that periods are chosen by.

Periods count completed steps: a state of period K is due after steps K, 2K, 3K, ... (arXiv 2505.22549, Alg. 1, where
step t averages the state that the first t steps left behind). Nothing is due before the first step: replicas start
equal."""

import math
from collections.abc import Mapping

Periods = Mapping[str, int | None]
"""Steps between averages of each state; ``None`` = never."""


def due(periods: Periods, steps: int) -> tuple[str, ...]:
    """The states to average once ``steps`` steps are complete, in the order of ``periods``."""
    return tuple(state for state, period in periods.items() if steps > 0 and period and steps % period == 0)


def half_life(beta: float) -> float:
    """tau(beta) = ln 0.5 / ln beta: the steps in which a momentum forgets half (arXiv 2505.22549, App. I)."""
    return math.log(0.5) / math.log(beta) if beta > 0 else 0.0


def half_life_period(beta: float) -> int:
    """The period that the half-life rule chooses for a momentum: round(tau(beta)), at least 1."""
    return max(1, round(half_life(beta)))


def vectors_per_step(periods: Periods) -> float:
    """Communication in parameter vectors per step, sum over states of 1/K; synchronous training moves 1."""
    return math.fsum(1 / period for period in periods.values() if period)
