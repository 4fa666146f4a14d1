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
from dataclasses import dataclass
from sys import maxsize

import torch
from torch import Tensor

from deslo_plugin.comm.buckets import pack
from deslo_plugin.kernels.delayed_update import land_


@dataclass
class _Kept:
    launched: Tensor
    factor: float = 1.0  # what is left of a difference made at the launch


class DelayedAverages:
    """For each parameter and state whose average flies: the values that were launched, and what updates leave of
    them."""

    def __init__(self, wire_dtype: torch.dtype):
        self.wire_dtype = wire_dtype
        self._kept: dict[tuple[Tensor, str], _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]]) -> None:
        """Copies ``states`` as they are launched, in wire dtype."""
        for state, tensors in states.items():
            copies = pack(tensors, self.wire_dtype, chunk_bytes=maxsize).views
            self._kept |= {(param, state): _Kept(copy) for param, copy in zip(params, copies)}

    def decay(self, params: Sequence[Tensor], factors: Mapping[str, float]) -> None:
        """An update of ``params`` was made, which leaves ``factors[state]`` of an earlier value of each state."""
        for state, factor in factors.items():
            for param in params:
                if kept := self._kept.get((param, state)):
                    kept.factor *= factor

    def launched(self, params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """The values of ``states`` that were launched; those of now where nothing was, as after a load."""
        for state, tensors in states.items():
            absent = [i for i, param in enumerate(params) if (param, state) not in self._kept]
            if absent:
                self.keep([params[i] for i in absent], {state: [tensors[i] for i in absent]})
        return {state: [self._kept[param, state].launched for param in params] for state in states}

    def land(
        self, params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]], means: Mapping[str, Sequence[Tensor]]
    ) -> None:
        """Puts ``means`` of the launched values into ``states`` as if they had been there since."""
        for state, mean in means.items():
            kept = [self._kept.pop((param, state)) for param in params]
            for factor in {each.factor for each in kept}:
                seats = [i for i, each in enumerate(kept) if each.factor == factor]
                x, local, averaged = (
                    [each[i] for i in seats] for each in (states[state], [k.launched for k in kept], mean)
                )
                land_(x, local, averaged, factor)

    def holds(self, params: Sequence[Tensor], states: Iterable[str]) -> bool:
        """Whether all of it was launched and has not landed."""
        return all((param, state) in self._kept for param in params for state in states)

    def drop(self, params: Sequence[Tensor], states: Iterable[str]) -> None:
        """Forgets what flew of these."""
        for key in [(param, state) for param in params for state in states]:
            self._kept.pop(key, None)

    def clear(self) -> None:
        """Forgets what flew."""
        self._kept.clear()

    def saved(self, params: Sequence[Tensor]) -> list[tuple[int, str, Tensor, float]]:
        """What flies: place in ``params``, state, launched value on the CPU, factor."""
        place = {param: index for index, param in enumerate(params)}
        return [(place[param], state, kept.launched.cpu(), kept.factor) for (param, state), kept in self._kept.items()]

    def load(self, params: Sequence[Tensor], saved: Sequence[tuple[int, str, Tensor, float]]) -> None:
        """Makes ``saved`` what flies: launched once more when it is to land, from the same values."""
        self._kept = {
            (params[i], state): _Kept(launched.to(params[i].device), factor) for i, state, launched, factor in saved
        }
