"""Algorithm 1 around whatever updates the parameters: what is due lands, the update is made, the clock ticks."""

import functools
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.adaptive import adaptive, shortest
from deslo_plugin.clock import Clock, Cohort
from deslo_plugin.collectives import Average
from deslo_plugin.config import DesloConfig
from deslo_plugin.last_average import LastAverage
from deslo_plugin.late import Late
from deslo_plugin.log import say
from deslo_plugin.momentum_bound import Bound, hold_
from deslo_plugin.names import BUFFERS, GRADIENTS, PARAMS, every
from deslo_plugin.outer import mean_
from deslo_plugin.schedule import Periods, due
from deslo_plugin.shards import local
from deslo_plugin.spread import Spread
from deslo_plugin.sync import States, Synchronizer, Weigh, finite
from deslo_plugin.strict import ConfigError
from deslo_plugin.telemetry import Meter, SyncEvent
from deslo_plugin.weights import Samples

Group = MutableMapping[str, Any]


class Averaging:
    """The averages of one optimizer's states, each on its period (arXiv 2505.22549, Alg. 1).

    Args:
        optimizer: its param groups hold the periods under ``sync_every`` (state name -> steps or None).
        deslo: who averages and how.
        average: the transport.
        clock: how many steps each parameter has completed.
        groups: what to average, where that is not the optimizer's param groups.
        receive: writes what landed, given (cohort, states, means); the plain mean by default.
        bounds: what first momenta of a param group are held to once they have landed; nothing by default.
        emit: called with every ``SyncEvent``, the first of ``listeners``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        deslo: DesloConfig,
        average: Average,
        clock: Clock,
        *,
        groups: Sequence[Group] | None = None,
        receive: Callable[[Cohort, States, States], None] | None = None,
        bounds: Callable[[Group], Sequence[Bound]] = lambda group: (),
        emit: Callable[[SyncEvent], object] | None = None,
    ):
        self.optimizer, self.deslo, self.average, self.clock = optimizer, deslo, average, clock
        self._groups, self.meter, self.listeners = groups, Meter(), [emit] if emit else []
        self.watch: Any = None  # told of steps and landings until the first averages have been looked at
        self.skips_nonfinite = deslo.on_nonfinite == "skip"
        self.receive = receive or (lambda cohort, states, means: write_means(states, means))
        self.bounds = bounds
        self._sync, self.late = self._synchronizer(average), Late(getattr(torch, deslo.wire_dtype))
        self._spread = Spread(average, self.record)
        self._periods: dict[int, Periods] = {}  # of each param group, by its id
        self._buffers: Sequence[Tensor] = ()
        self._convened = False
        self._met = 0
        self.kept: LastAverage | None = None  # whoever wants it sets it
        self._samples = Samples() if deslo.weights == "samples" else None

    def add_buffers(self, buffers: Sequence[Tensor], average: Average) -> None:
        """Floating buffers of the model, averaged when parameters are, as they are at that moment."""
        self._buffers, self._buffer_sync = buffers, self._synchronizer(average)

    def saw(self, samples: float) -> None:
        """Tells what is in the gradients of this rank's next step, in samples, tokens, or whatever is counted on every rank.

        ``deslo.weights: "samples"`` needs it before each step; calls add up, as over micro-batches. Raises ``ConfigError`` for
        what is no number >= 0, and where nobody asks.
        """
        if self._samples is None:
            raise ConfigError("saw(samples)", 'deslo.weights "samples"', '"equal"', "set it, or remove the call")
        self._samples.saw(samples)

    @property
    def groups(self) -> Sequence[Group]:
        return self.optimizer.param_groups if self._groups is None else self._groups

    def around(self, update: Callable[[list[Cohort]], object]) -> None:
        """One step: averages what is due, calls ``update``, and ticks."""
        if self.watch:
            self.watch.step_begins()
        if not self._convened:
            self._convened = True
            if self._convene():  # a latecomer: it stands where the others do, at the end of a step
                return self._depart(self._cohorts())
        cohorts = self._cohorts()
        if self.deslo.when == "before_update":
            self._average(cohorts)  # x, u, v <- E_m[...] where t % K == 0
        update(cohorts)  # u, v, x <- the local rule
        for index, cohort in enumerate(cohorts):
            self.clock.set(cohort, cohort.steps + 1)
            cohorts[index] = cohort._replace(steps=cohort.steps + 1)
            self._tick_samples(cohorts[index])
        if cohorts:
            self.meter.tick(cohorts[0].steps)
        if self.kept and self.steps == self.deslo.synchronous_steps:
            self.keep()
        if any(map(self._names_due, cohorts)) and self._convene():
            cohorts = self._cohorts()
        self._depart(cohorts)
        if self.watch:
            self.watch.step_ended()

    def _depart(self, cohorts: list[Cohort]) -> None:
        """What is due at the end of a step is averaged or launched."""
        if self.deslo.when == "after_update":
            self._average(cohorts)
        elif self.deslo.overlap:
            for cohort in cohorts:
                states = self._due(cohort)
                self._sync.launch(cohort.steps, cohort.params, states, self._weigh(cohort))
                self._spread.launch(cohort.params, _adaptive(cohort, states))
                if self.deslo.delay > 1:
                    self.late.keep(cohort.params, states)

    def _cohorts(self) -> list[Cohort]:
        cohorts = [cohort for group in self.groups for cohort in self.clock.cohorts(group)]
        self._periods |= {id(cohort.group): cohort.periods for cohort in cohorts}
        return cohorts

    def _convene(self) -> bool:
        start = time.perf_counter()
        replaced = self.average.convene()
        self.meter.seconds_exposed += time.perf_counter() - start
        return replaced

    def periods(self, group: Group) -> Periods:
        """The periods in force in a param group; adaptive ones change (where ZeRO cuts a group, those of its last part)."""
        return self._periods.get(id(group), shortest(group["sync_every"]))

    @property
    def diverged(self) -> bool:
        """Whether this replica has taken steps of its own since all were equal. What averages since then is not looked at."""
        return self.steps > max(self._met, self.deslo.synchronous_steps)

    def met(self) -> None:
        """Says that all replicas are equal now."""
        self._met = self.steps
        self.keep()

    def keep(self) -> None:
        """Copies parameters and buffers, which all replicas hold alike, if somebody wants the last average."""
        for tensors in [*(group["params"] for group in self.groups), self._buffers] if self.kept else ():
            self.kept.take(self.steps, tensors, local(tensors))

    def loaded(self) -> None:
        """The optimizer has loaded states: whether replicas are equal is not known any more."""
        self._met = 0

    def abandon(self) -> None:
        """Drops averages in flight: after a load they start from the loaded values, when they were about to land."""
        self._met = 0  # an exact load leaves replicas that differ
        self._sync.abandon()
        self._spread.abandon()
        self.late.clear()
        for each in filter(None, (self._samples, self.kept)):
            each.forget()

    def aside(self) -> dict[str, Any]:
        """What this rank knows of its averages beside the optimizer's state: values that were launched, samples seen."""
        params = list(self.optimizer.state)
        return {"late": self.late.saved(params), "samples": self._samples.saved(params) if self._samples else None}

    def put_aside(self, aside: Mapping[str, Any]) -> None:
        """Goes on from what ``aside`` gave, with a state that has as many parameters in the same order."""
        params = list(self.optimizer.state)
        self.late.load(params, aside["late"])
        if self._samples and aside["samples"]:
            self._samples.load(params, aside["samples"])

    def means(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means of any floating tensors in at least float32, counted under ``name``; they stay as they are. Collective."""
        if not tensors:
            return []
        wire = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
        return self._synchronizer(self.average, wire).mean(self.steps, {name: tensors})[name]

    def broken(self) -> bool:
        """Whether this replica must leave out the update because its gradients are not finite.

        A ``GradScaler`` says so in ``optimizer.found_inf``; with ``on_nonfinite: "skip"`` the gradients are looked at.
        Collective over the replica's ranks where either applies.
        """
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is None and not self.skips_nonfinite:
            return False
        mine = bool(found_inf) if found_inf is not None else not finite(self.gradients())
        broken = self.average.any(mine)
        self.meter.skipped_steps += broken
        return broken

    @property
    def steps(self) -> int:
        """Completed steps of the first parameter."""
        return self.clock.steps(self.groups)

    @property
    def synchronous(self) -> bool:
        """Whether the warm-up lasts, in which gradients are averaged at every step and states are equal anyway."""
        return self.deslo.synchronous_steps > 0 and self.steps < self.deslo.synchronous_steps

    def average_gradients(self, steps: int, gradients: Sequence[Tensor]) -> None:
        """gradients <- E_m[gradients], at once: what step number ``steps`` of the warm-up does before clipping. Collective."""
        if gradients:
            states = {GRADIENTS: local(gradients)}
            write_means(states, self._sync.mean(steps, states))

    def gradients(self) -> Sequence[Tensor]:
        """This rank's part of every gradient that there is."""
        params = (param for group in self.groups for param in group["params"])
        return local([param.grad for param in params if param.grad is not None])

    def gather(self, state: str, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """This rank's part of a state of each parameter; zeros where a stock optimizer has not created it yet."""
        if state == PARAMS:
            return local(params)
        states = (self.optimizer.state[param].get(state) for param in params)
        return local([torch.zeros_like(p) if s is None else s for p, s in zip(params, states)])

    def _average(self, cohorts: Sequence[Cohort]) -> None:
        cohorts = [cohort._replace(steps=cohort.steps + 1 - self.deslo.delay) for cohort in cohorts]  # as they were launched
        due = [(cohort, states) for cohort in cohorts if (states := self._due(cohort))]
        sent = [states if self.deslo.delay == 1 else self.late.launched(cohort.params, states) for cohort, states in due]
        for (cohort, _), states in zip(due, sent):  # all that is due flies before the first lands: it arrives or not as one
            self._sync.launch_absent(cohort.steps, cohort.params, states, self._weigh(cohort))
            self._spread.launch(cohort.params, _adaptive(cohort, states))
        meeting = [cohort for cohort, states in due if PARAMS in states] if self._buffers else []
        buffers = {BUFFERS: self._buffers}
        if meeting:
            self._buffer_sync.launch(meeting[0].steps, self._buffers, buffers, self._weigh(meeting[0], PARAMS))
        landed = True
        for (cohort, states), launched in zip(due, sent):
            means = self._sync.land(cohort.steps, cohort.params, launched)
            if means is None:
                landed = False
                self._spread.abandon()
                continue
            self._adapt(cohort, means)
            if self.deslo.delay == 1:
                self.receive(cohort, states, means)
                if self.watch and PARAMS in states:
                    self.watch.landed(cohort.params)
            else:
                self.late.land(cohort.params, states, means)
            if self.kept:
                self.kept.landed(cohort.steps, cohort.params, states, means)
            now = cohort.steps + self.deslo.delay - 1
            hold_(self.bounds(cohort.group), means, functools.partial(self.gather, params=cohort.params), now)
        if meeting and (means := self._buffer_sync.land(meeting[0].steps, self._buffers, buffers)):
            write_means(buffers, means)
            if self.kept:
                self.kept.take(meeting[0].steps, self._buffers, self._buffers)
        self.meter.refused_averages += not landed

    def _adapt(self, cohort: Cohort, means: States) -> None:
        """Lets the drift that an average has found choose the periods of its adaptive states from now on."""
        for state, mean in _adaptive(cohort, means).items():
            drift = self._spread.land(cohort.steps, cohort.params, state, mean)
            before, bounds = cohort.periods[state], cohort.group["sync_every"][state]
            period = cohort.periods[state] = bounds.after(cohort.steps, before, drift)
            for param in cohort.params:
                self.optimizer.state[param][every(state)] = torch.tensor(float(period))
            if period != before:
                say(f"deslo: {state} is averaged every {period} steps now, after step {cohort.steps} found drift {drift:.3g} at "
                    f"every {before} ({bounds})")

    def _weigh(self, cohort: Cohort, like: str | None = None) -> Weigh | None:
        """What this rank has seen since the last average of a state of ``cohort``, or of its state ``like``."""
        if self._samples is None:
            return None
        return lambda state: self._samples.seen(cohort.params, cohort.steps, cohort.group["sync_every"][like or state])

    def _tick_samples(self, cohort: Cohort) -> None:
        if self._samples:
            self._samples.tick(cohort.params, cohort.steps, max(filter(None, cohort.group["sync_every"].values()), default=1))

    def _due(self, cohort: Cohort) -> dict[str, Sequence[Tensor]]:
        return {state: self.gather(state, cohort.params) for state in self._names_due(cohort)}

    def _names_due(self, cohort: Cohort) -> tuple[str, ...]:
        return due(cohort.periods, cohort.steps) if cohort.steps > self.deslo.synchronous_steps else ()

    def _synchronizer(self, average: Average, wire_dtype: torch.dtype | None = None) -> Synchronizer:
        wire, chunk = wire_dtype or getattr(torch, self.deslo.wire_dtype), self.deslo.bucket_mb << 20
        return Synchronizer(average, wire_dtype=wire, bucket_bytes=chunk, emit=self.record)

    def record(self, event: SyncEvent) -> None:
        """Counts ``event`` and passes it on to ``emit`` and to those who listen."""
        self.meter(event)
        if self.average.progress:
            self.average.progress.waited(event.seconds_exposed)
        for listener in self.listeners:
            listener(event)


def _adaptive(cohort: Cohort, states: States) -> States:
    """Those of ``states`` whose periods adapt."""
    return {state: states[state] for state in adaptive(cohort.group["sync_every"]) if state in states}


def write_means(states: States, means: States) -> None:
    """states <- means, in place."""
    for state, mean in means.items():
        mean_(states[state], mean)
