"""What a second moment allows a first momentum: Adam's steps stay bounded after averages on unequal periods (not in the
papers).

With u <- beta u + (1 - beta) g and v <- beta2 v + (1 - beta2) g^2, both from 0, whatever the gradients were
(Cauchy-Schwarz),

    |u_t| <= C_t sqrt(v_t)      C_t^2 = (1 - beta)^2 / (1 - beta2) (1 + r + ... + r^(t-1)),   r = beta^2 / beta2

in each coordinate, so that Adam alone takes no step above about C lr, with C = C_inf for r < 1. Means of u and v
together keep it (Jensen), and so does every update. The mean of u beside a replica's own v does not: where this
replica's gradients were zero and another's were not, u comes to v = 0, and the step is lr u / eps. Nor does the mean of
v beside its own u. So after each landing

    u <- clamp(u, -C sqrt(v), C sqrt(v))

It is the nearest momentum to what has landed that this replica's own Adam could have, never farther from it than its
own was. For r >= 1 there is no C for all times, as the steps of Adam alone have no bound where gradients are rare: then
it is C_t, t the completed steps, which soon keeps little but v = 0 from harm.
Adamax divides by a maximum, w <- max(beta2 w, |g|): |u_t| <= (1 - beta) (1 + q + ... + q^(t-1)) w_t with q = beta /
beta2."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.algorithm.state_names import PARAMS, SECOND_MOMENT

LARGEST = 2.0**60  # finite, so that 0 stays the bound where v is 0
DIVIDES = ("sq", "second", "_var", "inf", "hess", "state2")  # parts of the names of what optimizers divide by
DIVIDED = (PARAMS, "momentum_buffer", "acc_delta", "z")  # of RMSprop, Adadelta, schedule-free: made of what was divided


class Bound(NamedTuple):
    """State ``first`` is held to what state ``second`` of the same parameter allows: a mean of squares, or (not
    ``squares``) a maximum."""

    first: str
    second: str
    beta: float
    beta2: float
    squares: bool = True

    @property
    def ratio(self) -> float:
        """r, or q of a maximum: from 1 on there is no bound for all times."""
        over = self.beta ** (2 if self.squares else 1)
        return over / self.beta2 if self.beta2 else LARGEST if over else 0.0

    def at(self, steps: int) -> float:
        """C, or where there is none C_t after ``steps`` steps, at most ``LARGEST``."""
        ratio = self.ratio
        try:
            terms = 1 / (1 - ratio) if ratio < 1 else steps if ratio == 1 else (ratio**steps - 1) / (ratio - 1)
        except OverflowError:
            return LARGEST
        return min(LARGEST, (1 - self.beta) * (math.sqrt(terms / (1 - self.beta2)) if self.squares else terms))


def bounds_of(constants: Mapping[str, Any], numels: Mapping[str, int]) -> list[Bound]:
    """Those of a stock optimizer whose states are Adam's or Adamax's.

    ``constants`` are what its param group says, ``numels`` the elements of each averaged state: an optimizer that keeps
    one second moment for many elements has no such bound.
    """
    betas = constants.get("betas")
    if not isinstance(betas, Sequence) or len(betas) != 2:
        return []
    beta, beta2 = map(float, betas)
    found = [Bound("exp_avg", SECOND_MOMENT, beta, beta2), Bound("exp_avg", "exp_inf", beta, beta2, squares=False)]
    return [bound for bound in found if bound.first in numels and numels[bound.first] == numels.get(bound.second)]


def loose(bounds: Sequence[Bound], periods: Mapping[str, int | None]) -> list[str]:
    """What ``bounds`` do not hold where states of ``periods`` are averaged: a sentence for each pair on unequal
    periods."""
    held = {(bound.first, bound.second): bound for bound in bounds}
    seconds = [state for state in periods if any(part in state for part in DIVIDES)]
    firsts = [state for state in periods if periods[state] and state not in (*seconds, *DIVIDED)]
    if "exp_avg_sq_row" in periods:  # Adafactor divides before it averages
        return []
    said, do = [], "give both one period in deslo.sync_every"
    # AMSGrad's is above v
    for first, second in product(firsts, (state for state in seconds if not state.startswith("max_"))):
        bound = held.get((first, second))
        if periods[first] == periods[second]:
            continue
        if bound is None:
            said.append(
                f"{first} and {second} are averaged on different periods, and how large the one may be beside the "
                "other is not known; where gradients are often zero on some replicas, steps may become very large: "
                f"{do}"
            )
        elif bound.ratio >= 1:
            said.append(
                f"beta {bound.beta:g} of {first} outlives beta2 {bound.beta2:g} of {second}, so that steps have no "
                f"bound where gradients are rare: take beta2 above {bound.ratio * bound.beta2:.4g}, or {do}"
            )
    return said


def hold_(bounds: Sequence[Bound], means: Mapping[str, Tensors], gather: Callable[[str], Tensors], steps: int) -> None:
    """Holds first momenta to their ``bounds``, in place, where they or their second moments have landed.

    ``means`` has landed and is not needed any more: it is overwritten, in place of temporaries. ``gather`` gives a
    state of each parameter, floating tensors of any dtypes in the shapes of its mean; ``steps`` are complete. Waits for
    no device."""
    for bound in bounds:
        limit = means.get(bound.first) or means.get(bound.second)
        if limit:
            first = gather(bound.first)
            torch._foreach_copy_(limit, gather(bound.second))
            if bound.squares:
                torch._foreach_sqrt_(limit)
            torch._foreach_mul_(limit, bound.at(steps))
            torch._foreach_minimum_(first, limit)
            torch._foreach_neg_(limit)
            torch._foreach_maximum_(first, limit)
