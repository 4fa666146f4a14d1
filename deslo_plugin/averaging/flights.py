"""What of one optimizer's averages is under way, with what travels beside it: launched, asked about, landed."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.adaptive_periods import adaptive
from deslo_plugin.algorithm.state_names import PARAMS, every
from deslo_plugin.averaging.delayed import DelayedAverages
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.recall import Answer, Recall
from deslo_plugin.averaging.replica_variance import ReplicaVariance
from deslo_plugin.averaging.step_counter import Cohort
from deslo_plugin.averaging.synchronizer import States, Synchronizer, Weigh
from deslo_plugin.config.schema import DesloConfig
from deslo_plugin.log import log_rank0

Due = Sequence[tuple[Cohort, States]]
"""Cohorts as they were launched, and what of them is to land."""


class Flights:
    """Averages of ``sync`` by ``deslo``; ``weigh`` says what this rank counts in those of a cohort."""

    def __init__(
        self,
        sync: Synchronizer,
        deslo: DesloConfig,
        weigh: Callable[[Cohort], Weigh | None],
        on_average: Callable[[SyncEvent], object],
    ):
        self._sync, self._deslo, self._weigh = sync, deslo, weigh
        self.late, self._spread = (
            DelayedAverages(getattr(torch, deslo.wire_dtype)),
            ReplicaVariance(sync.transport, on_average),
        )
        self._recall = Recall(sync.transport, getattr(torch, deslo.wire_dtype))

    def launch(self, cohort: Cohort, states: States) -> None:
        """What is due at the end of a step, to land at the begin of another."""
        if self._deslo.sync_delay > 1:
            self.late.keep(cohort.params, states)
        else:
            self._recall.launched(cohort.steps, cohort.params, states)
        self._sync.launch(cohort.steps, cohort.params, states, self._weigh(cohort))
        self._spread.launch(cohort.params, of_adaptive(cohort, states))

    def ask(self, due: Due, moved: bool) -> list[Answer]:
        """What all replicas say of each cohort before it lands; drops what must not land. Collective.

        ``moved``: this replica trains other parameters than those that average.
        """
        questions = [
            self._recall.ask(
                cohort.steps,
                cohort.params,
                states,
                written=self._written(cohort, states),
                moved=moved and PARAMS in states,
            )
            for cohort, states in due
        ]
        answers = [question.answer() for question in questions]
        for (cohort, states), answer in zip(due, answers):
            if answer.written:
                answer.bytes.update(self._sync.drop(cohort.params, states))
                self._spread.drop(cohort.params)
                self.late.drop(cohort.params, states)
        return answers

    def _written(self, cohort: Cohort, states: States) -> bool | None:
        """Whether what flies must not land, by what this replica knows without looking at values; None: they decide."""
        if not self._deslo.overlap_comm:
            return False
        return None if self._deslo.sync_delay == 1 else not self.late.holds(cohort.params, states)

    def complete(self, due: Due) -> list[States]:
        """Launches what is to land and does not fly yet; what was launched of each cohort."""
        sent = [
            states if self._deslo.sync_delay == 1 else self.late.launched(cohort.params, states)
            for cohort, states in due
        ]
        for (cohort, _), states in zip(due, sent):
            self._sync.launch_absent(cohort.steps, cohort.params, states, self._weigh(cohort))
            self._spread.launch(cohort.params, of_adaptive(cohort, states))
        return sent

    def land(self, cohort: Cohort, launched: States, answer: Answer) -> States | None:
        """The means, as ``Synchronizer.land`` gives them."""
        means = self._sync.land(cohort.steps, cohort.params, launched, answer)
        if means is None:
            self._spread.abandon()
        return means

    def adapt(self, cohort: Cohort, means: States, states: Mapping[Tensor, MutableMapping[str, Any]]) -> None:
        """Lets the drift that an average has found choose the periods of its adaptive states from now on: in
        ``cohort``, and in the ``states`` of its parameters. The same on every rank. Collective where periods adapt."""
        for state in of_adaptive(cohort, means):
            drift = self._spread.land(cohort.steps, cohort.params, state, means[state])
            before, bounds = cohort.periods[state], cohort.group["sync_every"][state]
            period = cohort.periods[state] = bounds.after(cohort.steps, before, drift)
            for param in cohort.params:
                states[param][every(state)] = torch.tensor(period, device="cpu")
            if period != before:
                log_rank0(
                    f"deslo: {state} is averaged every {period} steps now, after step {cohort.steps} found drift "
                    f"{drift:.3g} at every {before} ({bounds})"
                )

    def abandon(self) -> None:
        """Drops all of it."""
        self._sync.abandon()
        self._spread.abandon()
        self._recall.forget()
        self.late.clear()


def of_adaptive(cohort: Cohort, states: States) -> States:
    """Those of ``states`` whose periods adapt."""
    return {state: states[state] for state in adaptive(cohort.group["sync_every"]) if state in states}
