"""Any optimizer's own states on periods of their own: torch's AdamW, Lion, Muon, whatever keeps tensors in
``state[p]``."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.momentum_bound import Bound, bounds_of, loose
from deslo_plugin.algorithm.outer_optimizer import write_means
from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.flight import States
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.state_averager import Group, StateAverager
from deslo_plugin.averaging.step_counter import GROUP_STEP, GroupClock
from deslo_plugin.comm.process_groups import any_of_shards
from deslo_plugin.comm.transport import Transport
from deslo_plugin.config.schema import DesloConfig
from deslo_plugin.errors import require
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.log import log_rank0
from deslo_plugin.optim.any_optimizer_states import (
    check_state_periods,
    counted_in,
    counter,
    counts,
    kinds_of,
    refuse_inner_loops,
    told,
    updates_of,
)

Everyone = Callable[[Any], list[Any]]
"""Everyone's value: collective over all ranks of all replicas."""


class AnyOptimizerAverager(StateAverager):
    """Averages the parameters and states of ``optimizer`` by ``deslo.sync_every``, keyed by torch's state names.

    Which states there are is known when the first step has created them. Then every tensor with dimensions that a
    parameter's state holds must be in ``sync_every``, with a period or null; counters (numbers and 0-dim tensors) need
    no average. A replica that has not trained a parameter yet counts as one whose gradient was zero: its states are
    zeros, they are created when an average brings something else, and their counters stand where its furthest
    parameter's stand. Of a parameter without dimensions all states are 0-dim: what others count in is a counter there
    too, and ``step``."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        deslo: DesloConfig,
        average: Transport,
        *,
        groups: Sequence[Group] | None = None,
        everyone: Everyone = lambda value: [value],
        on_average: Callable[[SyncEvent], object] | None = None,
    ):
        refuse_inner_loops(optimizer)
        self._sync_every = require(deslo.sync_every)
        super().__init__(
            optimizer,
            deslo,
            average,
            GroupClock(),
            groups=groups,
            receive=self._receive,
            bounds=self._bounds,
            on_average=on_average,
        )
        self._everyone, self.periods_known = everyone, False
        self._known: dict[str, Any] = {}  # state name -> dtype of a state, or the value of a counter
        self._taken: list[Group] = []
        self._asked = False
        self.take_in()

    def before_update(self) -> list[Cohort] | None:
        self.take_in()
        if not self._asked:
            self._asked = True
            if self.transport.progress:
                self.transport.progress.change("the first optimizer.step()", "", self.deslo.timeout_s)
            self.learn_states(bool(self.optimizer.state))  # that were loaded: some may be due at once
        return super().before_update()

    def after_update(self, cohorts: list[Cohort]) -> None:
        """As ever; states that the first update has created are due as parameters are. Collective."""
        now = [cohort._replace(periods=cohort.group["sync_every"]) if cohort.periods else cohort for cohort in cohorts]
        super().after_update(now)

    def take_in(self) -> None:
        """Gives param groups that are new, by a load or ``add_param_group``, their periods and a clock: the one that
        was loaded, the count of their states' updates, or where the others stand."""
        new = [
            index
            for index, group in enumerate(self.groups)
            if index >= len(self._taken) or self._taken[index] is not group
        ]
        counted = max(
            (
                updates_of(self.optimizer.state.get(param, {}))
                for index in new
                for param in self.groups[index]["params"]
            ),
            default=0,
        )
        clocks = [self.groups[index][GROUP_STEP] for index in new if GROUP_STEP in self.groups[index]] + [counted] * (
            counted > 0
        )
        counters = counted_in(self.optimizer.state)
        for index in new:
            before = self._taken[min(index, len(self._taken) - 1)].get(GROUP_STEP, 0) if self._taken else 0
            group = self.groups[index]
            if self._groups is None:  # an engine's clock is the engine's
                group[GROUP_STEP] = max(clocks, default=before)  # 0, where that was loaded
            own = {
                name for name in kinds_of(group["params"], self.optimizer.state, counters) if name in self._sync_every
            }
            self._schedule(group, own | {name for name in self._known if name in self._sync_every})
        self._taken = list(self.groups)

    def loading(self, state_dict: Mapping[str, Any]) -> None:
        """Before a load: every rank must bring the same step, or none loads. Collective."""
        groups, states = state_dict["param_groups"], state_dict["state"].values()
        clock = max([*(group.get(GROUP_STEP, 0) for group in groups), *map(updates_of, states)], default=0)
        if self.transport.progress:
            self.transport.progress.change(
                "optimizer.load_state_dict", f"{len(groups)} param group(s) of step {clock}", self.deslo.timeout_s
            )
        self.abandon()

    def loaded(self) -> None:
        """After a load: goes on from its clock."""
        self.take_in()

    def learn_states(self, updated: bool) -> None:
        """After an update: gives each param group the periods of the states that it turned out to have.

        Does nothing more once it knows them; ``updated`` is False on a replica that left this update out. Raises
        ``ConfigError`` for a name that no state has, a state that no name covers, and a period for a state that has no
        mean (whole numbers, quantised blocks). Collective; all ranks decide alike.
        """
        if self.periods_known:
            return
        counters = counted_in(self.optimizer.state)
        mine = [
            (kinds_of(group["params"], self.optimizer.state, counters), told(self._counters(group["params"])))
            for group in self.groups
        ]
        updates, *everyone = zip(*self._everyone((updated, *mine)))
        if not any(updates):
            return
        kinds = [{name: kind for each, _ in of_group for name, kind in each.items()} for of_group in everyone]
        known = {name: kind for of_group in kinds for name, kind in of_group.items()}
        check_state_periods(self._sync_every, known, type(self.optimizer).__name__)
        for group, of_group in zip(self.groups, kinds):
            self._schedule(group, of_group)
        self._known = {
            name: counter(*each_told)
            for of_group in everyone
            for _, each in of_group
            for name, each_told in each.items()
        } | known
        self.periods_known = True
        for said in dict.fromkeys(
            said for group in self.groups for said in loose(self._bounds(group), group["sync_every"])
        ):
            log_rank0(f"deslo: {type(self.optimizer).__name__}: {said}", logging.WARNING)

    def _bounds(self, group: Group, steps: int = 0) -> list[Bound]:
        """By the constants of the optimizer's own param group: DeepSpeed's tensors are in others, in the same order."""
        index = next(index for index, each in enumerate(self.groups) if each is group)
        return bounds_of(self.optimizer.param_groups[index], self.state_numels(group))

    def state_numels(self, group: Group) -> dict[str, int]:
        """State -> elements that average on this rank: not all have the sizes of the parameters."""
        averaged = {
            name: [self.optimizer.state.get(param, {}).get(name, param) for param in self.members.of(group)]
            for name in group["sync_every"]
            if name != PARAMS
        }
        return {name: sum(value.numel() for value in local(values)) for name, values in averaged.items()}

    def resume(self, steps: int) -> None:
        """Goes on after ``steps`` completed steps, with states that a checkpoint has brought: some may be due at
        once."""
        for group in self.groups:
            group[GROUP_STEP] = steps
        self._asked = True
        self.learn_states(steps > 0)

    def skip_step(self) -> None:
        """A step without an update, which every other replica may be taking: the clock ticks and averages land."""
        cohorts = self.before_update()
        if cohorts is not None:
            self.learn_states(updated=False)
            self.after_update(cohorts)

    def _schedule(self, group: Group, names: Iterable[str]) -> None:
        names = sorted(names)
        group["sync_every"] = {PARAMS: self._sync_every[PARAMS]} | {name: self._sync_every[name] for name in names}

    def _receive(self, cohort: Cohort, states: States, means: States) -> None:
        write_means(states, means)
        absent = [
            (param, name, seat)
            for name in means
            if name != PARAMS
            for seat, param in enumerate(cohort.params)
            if name not in self.optimizer.state.get(param, {})
        ]
        in_engine = self._groups is not None  # whose tensors may be parts without saying of what
        if in_engine and absent and not self.transport.any(any(bool(means[n][seat].any()) for _, n, seat in absent)):
            return
        for param, name, seat in absent:
            used = bool(means[name][seat].any())
            if self.transport.any(used) if in_engine else any_of_shards(param, used):
                self._create_states(cohort, param)
                self.part(cohort, name)[seat].copy_(means[name][seat])

    def _create_states(self, cohort: Cohort, param: Tensor) -> None:
        """Zeros for each state that parameters of its group have, and the counters of the one that has counted
        furthest."""
        state, params = self.optimizer.state[param], cohort.group["params"]
        counters = self._counters(params) or {
            name: value for name, value in self._known.items() if not isinstance(value, str)
        }
        for name in cohort.group["sync_every"]:
            if name != PARAMS and name not in state and name in self._known:
                state[name] = torch.zeros_like(param, dtype=getattr(torch, self._known[name]))
        for name, value in counters.items():
            state.setdefault(name, value.clone() if isinstance(value, Tensor) else value)

    def _counters(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """Name -> value of the counters of that parameter which has been updated most often."""
        states = [state for param in params if (state := self.optimizer.state.get(param))]
        furthest: Mapping[str, Any] = max(states, key=updates_of, default={})
        return {name: value for name, value in furthest.items() if name not in self._sync_every and counts(value)}
