"""Runs Algorithm 1 for any optimizer: applies the averages that are due, counts the step, starts the next averages."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.adaptive_periods import shortest
from deslo_plugin.algorithm.momentum_bound import Bound, hold_
from deslo_plugin.algorithm.outer_optimizer import write_means
from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.algorithm.schedule import Periods
from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.companions import Companions
from deslo_plugin.averaging.delayed import add_difference
from deslo_plugin.averaging.flight import Landing, States, Weigh
from deslo_plugin.averaging.flights import Due, Flights
from deslo_plugin.averaging.fragments import Fragments
from deslo_plugin.averaging.gradients import Gradients
from deslo_plugin.averaging.last_average import LastAverage
from deslo_plugin.averaging.members import Group, Members
from deslo_plugin.averaging.metrics import Meter, SyncEvent
from deslo_plugin.averaging.recall import Answer
from deslo_plugin.averaging.step_counter import Clock
from deslo_plugin.averaging.synchronizer import Synchronizer
from deslo_plugin.averaging.wire_states import Store, WireStates
from deslo_plugin.comm.sample_weights import Samples
from deslo_plugin.comm.transport import Transport
from deslo_plugin.config.schema import DesloConfig
from deslo_plugin.kernels.local_tensors import local, states_of


class StateAverager:
    """The averages of one optimizer's states, each on its period (arXiv 2505.22549, Alg. 1).

    Args:
        optimizer: its param groups hold the periods under ``sync_every`` (state name -> steps or None).
        deslo: who averages and how.
        average: the transport.
        clock: how many steps each parameter has completed.
        groups: what to average, where that is not the optimizer's param groups.
        receive: writes what landed, given (cohort, states, means); the plain mean by default.
        bounds: what first momenta of a param group are held to that land after so many steps; nothing by default.
        on_average: called with every ``SyncEvent``, the first of ``listeners``.
        wire_states: where quantised averages keep what they go by, by parameter; by default with the averager.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        deslo: DesloConfig,
        average: Transport,
        clock: Clock,
        *,
        groups: Sequence[Group] | None = None,
        receive: Callable[[Cohort, States, States], None] | None = None,
        bounds: Callable[[Group, int], Sequence[Bound]] = lambda group, steps: (),
        on_average: Callable[[SyncEvent], object] | None = None,
        wire_states: Store | None = None,
    ):
        self.optimizer, self.deslo, self.transport, self.clock, self.bounds = optimizer, deslo, average, clock, bounds
        self._groups, self.stats, self.listeners = groups, Meter(), [on_average] if on_average else []
        self.watch: Any = None  # told of steps and landings until the first averages have been looked at
        self.receive = receive or (lambda cohort, states, means: write_means(states, means))
        self._sync, self.members = self._synchronizer(average), Members()
        skips = deslo.on_nonfinite == "skip"
        self.gradients = Gradients(optimizer, lambda: self.groups, self._sync, self.stats, skips_nonfinite=skips)
        self.wire = WireStates(deslo.wire, wire_states, self.local_tensors, self.means)
        self.flights = Flights(self._sync, deslo, self.wire, self._weigh, self.record)
        self.fragments = Fragments(deslo.fragments)
        self._periods: dict[int, Periods] = {}  # of each param group, by its id
        self.add_buffers((), average)
        self._held: list[Cohort] | None = None  # what launches are put off for, while a framework synchronises
        self._convened, self._met, self.samples = False, 0, Samples(wanted=deslo.replica_weights == "samples")
        self.kept: LastAverage | None = None  # whoever wants it sets it

    def add_buffers(self, buffers: Tensors, average: Transport) -> None:
        """Floating buffers of the model, averaged when parameters are, as they are at that moment."""
        self.buffers, self._companions = buffers, Companions(buffers, self._synchronizer(average))

    @property
    def groups(self) -> Sequence[Group]:
        return self.optimizer.param_groups if self._groups is None else self._groups

    def before_update(self) -> list[Cohort] | None:
        """Applies the averages that are due: x, u, v <- E_m[x], E_m[u], E_m[v] where t % K = 0 (Algorithm 1, SERVER).
        Collective.

        Returns what the update is for; None where this replica has just taken over another's state, which stands at
        the end of a step: no update then.
        """
        if self.watch:
            self.watch.step_begins()
        if not self._convened:
            self._convened = True
            if self._start_quorum():
                self._start_due_averages(self._cohorts())
                return None
        cohorts = self._cohorts()
        self.stats.tick(map(id, (param for cohort in cohorts for param in cohort.params)))
        return self._average(cohorts) if self.deslo.average_at == "before_step" else cohorts

    def after_update(self, cohorts: list[Cohort]) -> None:
        """Counts the step of ``cohorts``; the averages that are due at its end start to travel. Collective."""
        for index, cohort in enumerate(cohorts):
            self.clock.set(cohort, cohort.steps + 1)
            cohorts[index] = cohort._replace(steps=cohort.steps + 1)
            self.samples.tick(cohort.group, cohort.steps + 1)
        self.wire.meet([cohort for cohort in cohorts if cohort.steps == self.deslo.synchronous_steps])
        if self.kept and self.steps == self.deslo.synchronous_steps:
            self.keep()
        if any(map(self._due, cohorts)) and self._start_quorum():
            cohorts = self._cohorts()
        self._start_due_averages(cohorts)
        if self.watch:
            self.watch.step_ended()

    def _start_due_averages(self, cohorts: list[Cohort]) -> None:
        """What is due at the end of a step is averaged or launched."""
        if self.deslo.average_at == "after_step":
            self._average(cohorts)
        elif self._held is not None:
            self._held += cohorts
        elif self.deslo.overlap_comm:
            for cohort, states in [due for each in cohorts for due in self._due(each)]:
                self.flights.launch(cohort, states)

    @contextmanager
    def launches_held(self) -> Iterator[None]:
        """Averages that are due inside start to travel at the end: what waits for a whole GPU would wait for them."""
        self._held = held = list[Cohort]()
        try:
            yield
        finally:
            self._held = None
        if held:
            self._start_due_averages(held)

    def _cohorts(self) -> list[Cohort]:
        """What averages, by clock, and what trains and does not average yet, without periods."""
        cohorts = self.members.cohorts(self.groups, self.clock)
        self._periods |= {id(cohort.group): cohort.periods for cohort in cohorts if cohort.periods}
        self.wire.prepare(cohorts, equal_until=max(self._met, self.deslo.synchronous_steps))
        return cohorts

    def _start_quorum(self) -> bool:
        start = time.perf_counter()
        replaced = self.transport.start_quorum()
        self.stats.seconds_exposed += time.perf_counter() - start
        return replaced

    def periods(self, group: Group) -> Periods:
        """The periods in force in a param group; adaptive ones change (where ZeRO cuts it, those of its last part)."""
        return self._periods.get(id(group), shortest(group["sync_every"]))

    @property
    def diverged(self) -> bool:
        """Whether this replica has taken steps of its own since all were equal, whatever averaged since."""
        return self.steps > max(self._met, self.deslo.synchronous_steps)

    def mark_synchronized(self) -> None:
        """Says that all replicas are equal now."""
        self._met = self.steps
        self.keep()
        if self.watch:
            self.watch.placed()

    def keep(self) -> None:
        """Copies parameters and buffers, which all replicas hold alike, if somebody wants the last average."""
        if kept := self.kept:
            for tensors in [*(group["params"] for group in self.groups), self.buffers]:
                kept.take(self.steps, tensors, local(tensors))

    def abandon(self) -> None:
        """Drops averages in flight: after a load they start from the loaded values, when they were about to land."""
        self._met = 0  # an exact load leaves replicas that differ
        self.flights.abandon()
        self.wire.forget()
        if self.watch:
            self.watch.placed()
        self.samples.forget()
        if self.kept:
            self.kept.forget()

    def get_extra_state(self) -> dict[str, Any]:
        """What this rank knows beside the optimizer's state: values that were launched, samples seen, bits lost."""
        own = {"samples": self.samples.saved(self.groups), "wire": self.wire.saved(self.groups)}
        return own | {"late": self.flights.saved(list(self.optimizer.state))}

    def set_extra_state(self, aside: Mapping[str, Any]) -> None:
        """Goes on from what ``aside`` gave, with a state that has as many parameters in the same order."""
        self.flights.load(list(self.optimizer.state), aside["late"])
        self.wire.load(self.groups, aside.get("wire", ()))
        self.samples.load(self.groups, aside["samples"])

    def means(self, name: str, tensors: Tensors) -> list[Tensor]:
        """The means of floating tensors in at least float32, counted under ``name``; they stay. Collective."""
        wire = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
        return self._sync.mean(self.steps, {name: tensors}, wire)[name] if tensors else []

    @property
    def steps(self) -> int:
        """Completed steps of the parameters that have most."""
        return self.clock.steps(self.groups)

    @property
    def synchronous(self) -> bool:
        """Whether the warm-up lasts, in which gradients are averaged at every step and states are equal anyway."""
        return self.deslo.synchronous_steps > 0 and self.steps < self.deslo.synchronous_steps

    def local_tensors(self, state: str, params: Tensors) -> Tensors:
        """This rank's part of a state of each parameter; zeros where a stock optimizer has not created it yet."""
        return local(params) if state == PARAMS else states_of(self.optimizer.state, state, params)

    def _average(self, cohorts: list[Cohort]) -> list[Cohort]:
        """Averages what is due; the cohorts from now on, which are others where parameters were frozen or unfrozen."""
        due, answers = self._ask(cohorts)
        landings = self.flights.complete(due)  # all start before any is waited for: they commit or fail together
        meeting = [cohort for cohort, states in due if PARAMS in states]
        self._companions.launch(meeting, self._weigh)
        landed = True
        for landing, answer in zip(landings, answers):
            if means := self.flights.land(landing, answer):
                self.flights.adapt(landing, means, self.optimizer.state)
                self._write(landing, means)
            landed = landed and means is not None
        self._companions.land(self.kept)
        self.stats.refused_averages += not landed
        if not any(answer.moved for answer in answers):
            return cohorts
        if landed:
            self.members.settle(param for cohort in meeting for param in cohort.params)
        return self._cohorts()

    def _write(self, landing: Landing, means: dict[str, list[Tensor]]) -> None:
        """Puts what has landed where it belongs."""
        cohort, states = landing.cohort, landing.states
        landing.carry()
        if self.deslo.sync_delay == 1:
            self.receive(cohort, states, means)
            if self.watch and PARAMS in states:
                self.watch.landed(cohort)
        else:
            add_difference(landing, means)
        if self.kept:
            self.kept.landed(cohort.steps, cohort.params, states, means)
        now = cohort.steps + self.deslo.sync_delay - 1
        hold_(self.bounds(cohort.group, now), means, functools.partial(self.part, cohort), now)

    def _ask(self, cohorts: list[Cohort]) -> tuple[Due, list[Answer]]:
        """What is due, once all replicas have said whether it may land; what may not flies anew. Collective."""
        due = self._all_due(cohorts)
        answers = self.flights.ask(due, any(PARAMS in states for _, states in due) and self.members.moved(self.groups))
        if any(answer.moved for answer in answers):
            told = functools.reduce(Answer.joined, answers)
            told.bytes[PARAMS] += self.members.agree(self.transport, self.groups)
            due = self._all_due(self._cohorts(), whole=True)
            for cohort, states in due:
                if PARAMS in states:
                    self.flights.drop(cohort, [PARAMS], told)
            answers = [told] + [Answer()] * (len(due) - 1)
        return due, answers

    def _all_due(self, cohorts: Sequence[Cohort], whole: bool = False) -> Due:
        launched = [cohort._replace(steps=cohort.steps + 1 - self.deslo.sync_delay) for cohort in cohorts]
        return [each for cohort in launched for each in self._due(cohort, whole)]

    def _weigh(self, cohort: Cohort, like: str | None = None) -> Weigh | None:
        """What this rank has seen since the last average of a state of ``cohort``, or of its state ``like``."""
        seen = self.samples.seen
        return (lambda state: seen(cohort.group, cohort.steps, like or state)) if self.samples.wanted else None

    def _due(self, cohort: Cohort, whole: bool = False) -> Due:
        """What is due of ``cohort``, as ``Fragments.due`` gives it."""
        if not cohort.params or cohort.steps <= self.deslo.synchronous_steps:
            return []
        parts = self.fragments.due(cohort, whole)
        return [(part, {state: self.part(part, state) for state in states}) for part, states in parts]

    def part(self, cohort: Cohort, state: str) -> Tensors:
        """What belongs to ``cohort`` of a state, on this rank, as ``local_tensors`` gives it."""
        return cohort.parts(self.local_tensors(state, cohort.params))

    def _synchronizer(self, average: Transport) -> Synchronizer:
        dtype, chunk = getattr(torch, self.deslo.wire.plain), self.deslo.bucket_cap_mb << 20
        return Synchronizer(average, wire_dtype=dtype, bucket_bytes=chunk, on_average=self.record)

    def record(self, event: SyncEvent) -> None:
        """Counts ``event`` and passes it on to ``on_average`` and to those who listen."""
        self.stats(event)
        if self.transport.progress:
            self.transport.progress.waited(event.seconds_exposed)
        for listener in self.listeners:
            listener(event)
