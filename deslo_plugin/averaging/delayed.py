"""Averages that land d steps after their launch, as exactly as local steps allow (``deslo.sync_delay``; not in the
papers).

An average is launched when t0 steps are complete and lands in ``step()`` when t0 + d - 1 are, before the update: it has
travelled under d forwards and backwards, and d - 1 updates were made in between, of the local values. d = 1 is the
papers' order, with no update in between. Momenta are linear recurrences, u <- beta u + (1 - beta) g, so that the mean
of the values at t0 can be put in after n updates exactly as if it had been there:

    u_j <- u_j + beta_j^n (E_m[u_j(t0)] - u_j(t0))          n = d - 1, less the steps that were skipped
    v   <- v + beta2^n (E_m[v(t0)] - v(t0))
    x   <- x + prod (1 - lr weight_decay) (E_m[x(t0)] - x(t0))

So what a script writes into a state while its average flies is kept, as an update is: x + (mean - launched). With d =
1, where no update is made in between, all replicas average again what was written (``recall``).

What stays approximate for d > 1: the n gradients were taken at parameters that were not averaged yet, and the n steps
of x went along momenta that were not.
"""

from collections.abc import Iterable, Mapping, Sequence
from sys import maxsize
from typing import NamedTuple

import torch
from torch import Tensor

from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.averaging.cohort import Key
from deslo_plugin.averaging.flight import Flight, Landing, States
from deslo_plugin.comm.buckets import pack
from deslo_plugin.kernels.delayed_update import land_


class Kept(NamedTuple):
    """A value that was launched, and what updates have left of a difference made then."""

    launched: Tensor
    remains: float = 1.0


class Resumed:
    """What flew when a checkpoint was saved: it is launched once more when it is to land, from the same values."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Key, str], Kept] = {}

    def holds(self, keys: Sequence[Key], state: str) -> bool:
        return all((key, state) in self._kept for key in keys)

    def take(self, keys: Sequence[Key], state: str, tensors: Tensors, dtype: torch.dtype) -> list[Kept]:
        """Of each part what flew, or a copy of what ``tensors`` hold now."""
        found = [self._kept.pop((key, state), None) for key in keys]
        absent = [tensor for tensor, kept in zip(tensors, found) if kept is None]
        copies = iter(copies_of(absent, dtype) if absent else ())
        return [kept or Kept(next(copies)) for kept in found]

    def load(self, saved: Iterable[tuple[Key, str, Tensor, float]]) -> None:
        self._kept = {(key, state): Kept(launched, remains) for key, state, launched, remains in saved}

    def items(self) -> Iterable[tuple[Key, str, Tensor, float]]:
        return ((key, state, *kept) for (key, state), kept in self._kept.items())

    def drop(self, keys: Sequence[Key], state: str) -> None:
        for key in keys:
            self._kept.pop((key, state), None)

    def decay(self, params: Sequence[Tensor], factors: Mapping[str, float]) -> None:
        """See ``decay``."""
        updated = set(map(id, params))
        for (key, state), kept in self._kept.items():
            if state in factors and id(parameter(key)) in updated:
                self._kept[key, state] = kept._replace(remains=kept.remains * factors[state])

    def clear(self) -> None:
        self._kept.clear()


def copies_of(tensors: Tensors, dtype: torch.dtype) -> list[Tensor]:
    """One or more tensors as they are now, in ``dtype``."""
    return pack(tensors, dtype, chunk_bytes=maxsize).views


def decay(flights: Iterable[Flight], params: Sequence[Tensor], factors: Mapping[str, float]) -> None:
    """An update of ``params`` was made, which leaves ``factors[state]`` of an earlier value of each state."""
    updated = set(map(id, params))
    for flight in flights:
        if flight.launched is not None and flight.state in factors:
            for seat, key in enumerate(flight.keys):
                if id(parameter(key)) in updated:
                    flight.remains[seat] *= factors[flight.state]


def add_difference(landing: Landing, means: States) -> None:
    """Puts ``means`` of the launched values into the states as if they had been there since."""
    for state, mean in means.items():
        remains = [flight.remains[seat] for flight, seat in landing.seats[state]]
        own, launched = landing.states[state], landing.launched[state]
        for factor in set(remains):
            seats = [seat for seat, each in enumerate(remains) if each == factor]
            x, before, after = ([column[seat] for seat in seats] for column in (own, launched, mean))
            land_(x, before, after, factor)


def parameter(key: Key) -> Tensor:
    return key[0] if isinstance(key, tuple) else key
