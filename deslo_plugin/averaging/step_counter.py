"""How many steps a parameter has completed: the clock that periods are counted on."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import cycle, groupby
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from deslo_plugin.algorithm.adaptive_periods import Schedule, adaptive
from deslo_plugin.algorithm.state_names import ORIGIN, STEP, period_key
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.count_vector import CountVectors

GROUP_STEP = "deslo_step"  # key of a param group


class Clock(Protocol):
    def steps(self, groups: Sequence[MutableMapping[str, Any]]) -> int:
        """Completed steps of the parameters that have most."""

    def cohorts(self, group: MutableMapping[str, Any], params: Sequence[Tensor]) -> Iterator[Cohort]:
        """Those ``params`` of ``group`` by their clock and device."""

    def set(self, cohort: Cohort, steps: int) -> None:
        """From now on the parameters of ``cohort`` have completed ``steps``."""


class ParameterClock:
    """A clock in the state of each parameter, ``state[p]["step"]``: right however a framework cuts a step into calls.

    Periods that adapt are there as well (``names.every``): what lands together decides together, and checkpoints have
    it."""

    def __init__(self, optimizer: torch.optim.Optimizer, create: Callable[[Tensor], dict[str, Any]]):
        self._optimizer, self._create, self._counts = optimizer, create, CountVectors()

    def steps(self, groups: Sequence[MutableMapping[str, Any]]) -> int:
        states = self._optimizer.state.values()  # param groups may be empty between steps
        return max((int(state[STEP]) for state in states if STEP in state), default=0)

    def cohorts(self, group: MutableMapping[str, Any], params: Sequence[Tensor]) -> Iterator[Cohort]:
        if not all(map(self._optimizer.state.get, params)):
            self._begin([param for param in params if not self._optimizer.state.get(param)], group["params"])
        for steps, abreast in self.by_steps(params):
            for periods, same in self._by_periods(group["sync_every"], abreast):
                yield Cohort(steps, group, same, periods)

    def _begin(self, newcomers: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Gives ``newcomers``, which train from now on, a state, and the clock of the ``others``: what they averaged
        together."""
        if not newcomers:
            return
        clocks = [int(self._optimizer.state[param][STEP]) for param in others if self._optimizer.state.get(param)]
        steps = max(clocks, default=self.steps(()))
        for param in newcomers:
            state = self._create(param)
            for counter in (STEP, ORIGIN):
                state[counter].fill_(steps)

    def _by_periods(
        self, schedule: Schedule, params: list[Tensor]
    ) -> Iterator[tuple[dict[str, int | None], list[Tensor]]]:
        adapt = adaptive(schedule)
        if not adapt:
            yield cast(dict[str, int | None], schedule), params
            return

        def now(param: Tensor) -> dict[str, int]:
            state = self._optimizer.state[param]
            return {name: bounds.allowed(int(state.get(period_key(name), 0))) for name, bounds in adapt.items()}

        for periods, same in groupby(sorted(params, key=lambda param: [*now(param).values()]), now):
            yield cast(dict[str, int | None], {**schedule, **periods}), list(same)

    def by_steps(self, params: Sequence[Tensor], since: str | None = None) -> Iterator[tuple[int, list[Tensor]]]:
        """Parameters by clock and device; with ``since``, of one device by the steps since that state's value."""
        if not params:
            return iter(())
        states = [self._optimizer.state[param] for param in params]
        counts = self._counts.read(states, STEP)
        if since:
            counts = [steps - start for steps, start in zip(counts, self._counts.read(states, since))]
        devices: list[torch.device | None] = [None] if since else [param.device for param in params]
        if len(set(counts)) == len(set(devices)) == 1:
            return iter([(counts[0], list(params))])
        cohorts: dict[tuple[int, torch.device | None], list[Tensor]] = {}
        for steps, device, param in zip(counts, cycle(devices), params):
            cohorts.setdefault((steps, device), []).append(param)
        return ((steps, cohort) for (steps, _), cohort in cohorts.items())

    def set(self, cohort: Cohort, steps: int, key: str = STEP) -> None:
        self._counts.fill([self._optimizer.state[param] for param in cohort.params], key, steps)


def counters_of(groups: Iterable[Mapping[str, Any]], moments: Iterable[str]) -> list[str]:
    """The 0-dim states of each parameter of ``groups``, which stay on the host."""
    adapt = {state for group in groups for state in adaptive(group["sync_every"])}
    return [STEP, ORIGIN, *(period_key(state) for state in moments if state in adapt)]


class GroupClock:
    """A clock in each param group, for optimizers that create a parameter's state at its first update."""

    def steps(self, groups: Sequence[MutableMapping[str, Any]]) -> int:
        return max((group.get(GROUP_STEP, 0) for group in groups), default=0)

    def cohorts(self, group: MutableMapping[str, Any], params: Sequence[Tensor]) -> Iterator[Cohort]:
        by_device: dict[torch.device, list[Tensor]] = {}
        for param in params:
            by_device.setdefault(param.device, []).append(param)
        steps = group.get(GROUP_STEP, 0)  # a group without parameters ages too: some may be added, or trained later
        return (Cohort(steps, group, same, group["sync_every"]) for same in by_device.values() or [[]])

    def set(self, cohort: Cohort, steps: int) -> None:
        cohort.group[GROUP_STEP] = steps
