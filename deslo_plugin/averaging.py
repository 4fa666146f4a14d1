"""Algorithm 1 around whatever updates the parameters: what is due lands, the update is made, the clock ticks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deslo_plugin.collectives import Average
from deslo_plugin.config import DesloConfig
from deslo_plugin.names import BUFFERS, GRADIENTS, PARAMS, STEP
from deslo_plugin.outer import mean_
from deslo_plugin.schedule import due
from deslo_plugin.shards import local
from deslo_plugin.sync import States, Synchronizer
from deslo_plugin.telemetry import Meter, SyncEvent


class Cohort(NamedTuple):
    """Parameters of one param group and device that have completed the same number of steps."""

    steps: int
    group: Mapping[str, Any]
    params: list[Tensor]


class Averaging:
    """The averages of one optimizer's states, each on its period (arXiv 2505.22549, Alg. 1).

    Args:
        optimizer: whose ``state[p][clock]`` counts the completed steps of each parameter, and whose param groups hold
            their periods under ``sync_every`` (state name -> steps or None).
        deslo: who averages and how.
        average: the transport.
        receive: writes what landed, given (cohort, states, means); the plain mean by default.
        create: makes the state of a parameter that has none; by default the optimizer does, in its own time.
        emit: called with every ``SyncEvent``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        deslo: DesloConfig,
        average: Average,
        *,
        clock: str = STEP,
        receive: Callable[[Cohort, States, States], None] | None = None,
        create: Callable[[Tensor], dict[str, Any]] = lambda param: {},
        emit: Callable[[SyncEvent], object] | None = None,
    ):
        self.optimizer, self.deslo, self.average = optimizer, deslo, average
        self.clock, self.meter, self._create, self._emit = clock, Meter(), create, emit
        self._receive = receive or (lambda cohort, states, means: write_means(states, means))
        self.buffers: list[Tensor] = []  # of the model, floating: they are averaged when parameters are, as they are then
        self._sync = Synchronizer(
            average, wire_dtype=getattr(torch, deslo.wire_dtype), bucket_bytes=deslo.bucket_mb << 20, emit=self._record
        )

    def around(self, update: Callable[[list[Cohort]], object], groups: Sequence[Mapping[str, Any]] | None = None) -> None:
        """One step of ``groups``, by default all: averages what is due, calls ``update``, and ticks."""
        groups = self.optimizer.param_groups if groups is None else groups
        cohorts = [Cohort(t, group, params) for group in groups for t, params in self.cohorts(group["params"])]
        before = self.deslo.when == "before_update"
        if before:
            self._average(cohorts)  # x, u, v <- E_m[...] where t % K == 0
        update(cohorts)  # u, v, x <- the local rule
        cohorts = [Cohort(t + 1, group, params) for t, group, params in cohorts]
        for cohort in cohorts:
            self.set_clock(cohort.params, cohort.steps)
        if not before:
            self._average(cohorts)
        elif self.deslo.overlap:
            for cohort in cohorts:
                self._sync.launch(cohort.steps, cohort.params, self._due(cohort))

    def abandon(self) -> None:
        """Drops averages in flight: after a load they start from the loaded values."""
        self._sync.abandon()

    @property
    def steps(self) -> int:
        """Completed steps of the first parameter."""
        first = next(param for group in self.optimizer.param_groups for param in group["params"])
        return int(self.optimizer.state[first].get(self.clock, 0))

    @property
    def synchronous(self) -> bool:
        """Whether the warm-up lasts, in which gradients are averaged at every step and states are equal anyway."""
        return self.deslo.synchronous_steps > 0 and self.steps < self.deslo.synchronous_steps

    def average_gradients(self, gradients: Sequence[Tensor]) -> None:
        """gradients <- E_m[gradients], at once: what a step of the warm-up does before clipping. Collective."""
        if gradients:
            states = {GRADIENTS: local(gradients)}
            write_means(states, self._sync.mean(self.steps + 1, states))

    def cohorts(self, params: Sequence[Tensor], since: str | None = None) -> Iterator[tuple[int, list[Tensor]]]:
        """Parameters by their clock and device; with ``since`` by the steps since that state's value."""
        cohorts: dict[tuple[int, torch.device], list[Tensor]] = {}
        for param in params:
            state = self.optimizer.state[param] or self._create(param)
            steps = int(state.get(self.clock, 0)) - (int(state[since]) if since else 0)
            cohorts.setdefault((steps, param.device), []).append(param)
        return ((steps, cohort) for (steps, _), cohort in cohorts.items())

    def gather(self, state: str, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """This rank's part of a state of each parameter; zeros where a stock optimizer has not created it yet."""
        if state == PARAMS:
            return local(params)
        states = (self.optimizer.state[param].get(state) for param in params)
        return local([torch.zeros_like(p) if s is None else s for p, s in zip(params, states)])

    def set_clock(self, params: Sequence[Tensor], steps: int, clock: str | None = None) -> None:
        for param in params:
            state = self.optimizer.state[param]
            state.setdefault(clock or self.clock, torch.zeros(())).fill_(steps)

    def _average(self, cohorts: Sequence[Cohort]) -> None:
        for cohort in cohorts:
            if states := self._due(cohort):
                self._receive(cohort, states, self._sync.land(cohort.steps, cohort.params, states))
        meeting = [cohort.steps for cohort in cohorts if PARAMS in self._names_due(cohort)]
        if self.buffers and meeting:
            buffers = {BUFFERS: self.buffers}
            write_means(buffers, self._sync.land(meeting[0], self.buffers, buffers))

    def _due(self, cohort: Cohort) -> dict[str, Sequence[Tensor]]:
        return {state: self.gather(state, cohort.params) for state in self._names_due(cohort)}

    def _names_due(self, cohort: Cohort) -> tuple[str, ...]:
        return due(cohort.group["sync_every"], cohort.steps) if cohort.steps > self.deslo.synchronous_steps else ()

    def _record(self, event: SyncEvent) -> None:
        self.meter(event)
        if self._emit is not None:
            self._emit(event)


def write_means(states: States, means: States) -> None:
    for state, mean in means.items():
        mean_(states[state], mean)
