"""What each momentum of a config remembers of its last average when the next one comes, by the papers' formulas."""

from math import inf
from typing import NamedTuple

import torch

from deslo_plugin.algorithm.adaptive_periods import longest, params_period
from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.algorithm.schedule import half_life
from deslo_plugin.algorithm.state_names import SECOND_MOMENT
from deslo_plugin.algorithm.theory import (
    first_momentum_drift,
    kept,
    local_variance,
    mutual_information,
    proven_rate,
    psi,
    second_momentum_drift,
    shared_variance,
)
from deslo_plugin.config.schema import OptimizerConfig


class Memory(NamedTuple):
    """A momentum between its averages. ``kept``: the share of the last average in it, when the next one comes.

    ``drift``: how far a coordinate can have gone, in units of rho (of rho^2 for the second momentum) where gradients
    are clipped to [-rho, rho]. Of a first momentum, at noise of deviation 1 in each coordinate: ``noise``, the variance
    of its local part, and ``information``, the nats in a coordinate of it of the average. ``half_life`` in steps.
    """

    state: str
    beta: float
    period: int | None
    half_life: float
    kept: float
    drift: float
    noise: float | None
    information: float | None


def memory(config: OptimizerConfig, replicas: int) -> list[Memory]:
    """Every momentum of ``config``, where ``replicas`` replicas average; periods that adapt are at their longest."""
    periods = longest(config.periods)
    # a momentum that is never averaged, nor reset, has been local for ever
    unshared = params_period(config.periods) if config.reset_momenta else inf
    return [
        _memory(state, beta, periods[state], unshared, replicas) for state, beta in config.after_switch.beta_of.items()
    ]


def _memory(state: str, beta: float, period: int | None, unshared: float, replicas: int) -> Memory:
    steps, second = period or unshared, state == SECOND_MOMENT
    noise, shared = local_variance(beta, steps), shared_variance(beta, replicas) if period else 0.0
    return Memory(
        state,
        beta,
        period,
        half_life(beta),
        kept=kept(beta, steps) if period else 0.0,
        drift=(second_momentum_drift if second else first_momentum_drift)(beta, steps),
        noise=None if second else noise,
        information=None
        if second
        else mutual_information(beta, steps, torch.tensor([[shared]]), torch.tensor([[noise]])),
    )


class Proven(NamedTuple):
    """Of a config of rule sgdm. ``rate``: the largest proven one times L, of a single momentum of weight 1, else
    None."""

    psi: float
    rate: float | None


def proven(config: OptimizerConfig) -> Proven | None:
    """What the papers prove of ``config``; None for other rules, of which they prove no rate in this form."""
    if RULES[config.rule].has_second_moment:
        return None
    config, own, periods = config.after_switch, params_period(config.periods), longest(config.periods)
    cost = psi(own, config.betas, config.weights, [periods[state] for state in config.momenta])
    return Proven(cost, proven_rate(config.betas[0], cost) if config.weights == (1.0,) else None)
