"""What averages in few bits go by (``deslo.wire_dtype``; not in the papers), beside the states themselves.

    x - c + e  ->  codes;    c <- E_m[...], where it lands;    e <- what the codes have lost

``c`` is what all replicas had in common at the state's last average, if it travels as a difference
(``deslo.wire_difference``), and ``e`` what was lost of its last average, if that is made good
(``deslo.wire_feedback``): float32 tensors of the state's shape, ``<state>_common`` and ``<state>_error``.

``c`` begins as the state is where replicas are equal, at the start or where the synchronous warm-up ends, and where
nobody can say that they are, as after a load of replicas that differ, as their mean.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.algorithm.state_names import common_key, error_key
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.members import Group
from deslo_plugin.config.wire import Wire
from deslo_plugin.errors import require
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.kernels.quantize import Format

Store = MutableMapping[Tensor, MutableMapping[str, Any]]


class Packed(NamedTuple):
    """What is to travel: parts of a state, what all replicas have in common of them, and what they lost before."""

    values: Tensors
    bases: Tensors
    errors: Tensors
    format: Format


class WireStates:
    """``c`` and ``e`` of parameters, in ``store``, the state of an optimizer of ours, or else here.

    Args:
        states: gives a state of some parameters, (name, parameters) -> one tensor for each.
        means: the means of tensors over replicas. Collective.
    """

    def __init__(
        self,
        wire: Wire,
        store: Store | None,
        states: Callable[[str, Tensors], Tensors],
        means: Callable[[str, Tensors], Sequence[Tensor]],
    ):
        self._states, self._means = states, means
        self._difference, self._feedback = require(wire.difference), require(wire.feedback)
        self._own: Store = {}
        self.store = self._own if store is None else store
        self._ready: set[int] = set()  # ids of parameters that have all of it

    def prepare(self, cohorts: Sequence[Cohort], equal_until: int) -> None:
        """Gives parameters that average, and have none yet, what their averages will go by. Collective where replicas
        have taken steps of their own, which they were equal before."""
        for cohort in cohorts if self._difference or self._feedback else ():
            new = [param for param in cohort.params if id(param) not in self._ready] if cohort.periods else []
            if new:
                self._create(new, cohort.periods, cohort.steps <= equal_until)
                self._ready.update(map(id, new))

    def _create(self, params: Sequence[Tensor], periods: Mapping[str, int | None], equal: bool) -> None:
        # which states a stock optimizer has is known after its first step: before it they are zeros everywhere
        for state in (state for state in self._difference if periods.get(state, 1)):
            absent = [param for param in params if common_key(state) not in self.store.setdefault(param, {})]
            values = self._states(state, absent)
            common = values if equal or not values else self._means(state, values)
            for param, value in zip(absent, common):
                self.store[param][common_key(state)] = _like(param, value)
        for state in (state for state in self._feedback if periods.get(state, 1)):
            for param in params:
                self.store.setdefault(param, {}).setdefault(error_key(state), _like(param))

    def make_room(self) -> None:
        """Before a load: parameters that have been trained have what a checkpoint may bring."""
        trained = [param for param, state in self.store.items() if state]
        self._create(trained, {}, equal=True)

    def saved(self, groups: Sequence[Group]) -> list[tuple[int, str, Tensor]]:
        """What is not in the optimizer's state: place among the parameters of ``groups``, name, this rank's part on the
        CPU."""
        params = [param for group in groups for param in group["params"]]
        kept = ((i, name, each) for i, param in enumerate(params) for name, each in self._own.get(param, {}).items())
        return [(i, name, local([each])[0].cpu()) for i, name, each in kept]

    def load(self, groups: Sequence[Group], saved: Iterable[tuple[int, str, Tensor]]) -> None:
        """Goes on from what was ``saved``."""
        params = [param for group in groups for param in group["params"]]
        for i, name, value in saved:
            self._own.setdefault(params[i], {})[name] = _like(params[i], value)

    def meet(self, cohorts: Sequence[Cohort]) -> None:
        """All replicas are equal: what they have in common is what they hold."""
        for cohort in (cohort for cohort in cohorts if cohort.periods):
            for state in (state for state in self._difference if cohort.periods.get(state, 1)):
                common = self._fitting(cohort.params, state, common_key(state))
                torch._foreach_copy_(common, self._states(state, cohort.params))

    def forget(self) -> None:
        """After a load: looks again at what there is."""
        self._ready.clear()

    def pack(self, cohort: Cohort, state: str, seats: Sequence[int], values: Tensors, format: Format) -> Packed:
        """``values``, the parts of ``cohort`` in ``seats``, with what they travel by."""
        common = self._parts(cohort, state, common_key(state), seats) if state in self._difference else []
        errors = self._parts(cohort, state, error_key(state), seats) if state in self._feedback else []
        return Packed(values, common, errors, format)

    def _parts(self, cohort: Cohort, state: str, name: str, seats: Sequence[int]) -> Tensors:
        parts = cohort.parts(self._fitting(cohort.params, state, name))
        return [parts[seat] for seat in seats]

    def _fitting(self, params: Tensors, state: str, name: str) -> Tensors:
        """This rank's parts of ``name``. Where a state turned out to have another shape than its parameter, what was
        made before its first step, zeros as it was, is made anew in that shape."""
        kept = list(local([self.store[param][name] for param in params]))
        for i, (param, value) in enumerate(zip(params, self._states(state, params))):
            if kept[i].shape != value.shape:
                self.store[param][name] = kept[i] = torch.zeros_like(value, dtype=torch.float32)
        return kept


def _like(param: Tensor, value: Tensor | None = None) -> Tensor:
    """A float32 tensor like ``param``, sharded as it is: zeros, or a copy of ``value``, which is this rank's part; like
    ``value`` where that has a shape of its own."""
    if value is not None and value.shape != local([param])[0].shape:
        return value.detach().to(param.device, torch.float32, copy=True)
    made = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)
    if value is not None:
        local([made])[0].copy_(value)
    return made.detach()
