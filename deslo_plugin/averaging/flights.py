"""What of one optimizer's averages is under way, with what travels beside it: launched, asked about, landed."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.adaptive_periods import adaptive
from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.algorithm.state_names import PARAMS, period_key
from deslo_plugin.averaging import delayed
from deslo_plugin.averaging.cohort import Cohort, Key
from deslo_plugin.averaging.flight import Flight, FlightTable, Landing, States, Weigh
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.recall import MOVED, WRITTEN, Answer, Recall
from deslo_plugin.averaging.replica_variance import ReplicaVariance
from deslo_plugin.averaging.synchronizer import Synchronizer
from deslo_plugin.averaging.wire_states import WireStates
from deslo_plugin.config.schema import DesloConfig
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.kernels.fingerprint import fingerprint
from deslo_plugin.log import log_rank0

Due = Sequence[tuple[Cohort, States]]
"""Cohorts as they were launched, and what of them is to land."""


class Flights:
    """Averages of ``sync`` by ``deslo``; ``weigh`` says what this rank counts in those of a cohort."""

    def __init__(
        self,
        sync: Synchronizer,
        deslo: DesloConfig,
        wire: WireStates,
        weigh: Callable[[Cohort], Weigh | None],
        on_average: Callable[[SyncEvent], object],
    ):
        self._sync, self._deslo, self._wire, self._weigh = sync, deslo, wire, weigh
        self._table, self._resumed = FlightTable(), delayed.Resumed()
        self._variance = ReplicaVariance(sync.transport, on_average)
        self._recall = Recall(sync.transport, sync.wire_dtype)

    @property
    def delayed(self) -> bool:
        """Whether something flies that updates change meanwhile."""
        return self._deslo.sync_delay > 1 and (any(self._table) or any(self._resumed.items()))

    def launch(self, cohort: Cohort, states: States) -> None:
        """Starts what is due at the end of a step, to land at the begin of another."""
        if states:
            self._sync.announce(cohort.steps)
        for state, tensors in states.items():
            flight = self._start(cohort, state, tensors, range(len(tensors)))
            if self._deslo.sync_delay == 1:
                flight.fingerprint = fingerprint(tensors)

    def _start(self, cohort: Cohort, state: str, tensors: Tensors, seats: Sequence[int]) -> Flight:
        """Starts the average of those of ``tensors`` in ``seats``, or of what flew of them when a checkpoint was
        saved."""
        weigh, kept = self._weigh(cohort), None
        keys, tensors = [cohort.keys[seat] for seat in seats], [tensors[seat] for seat in seats]
        if self._deslo.sync_delay > 1:
            kept = self._resumed.take(keys, state, tensors, self._sync.wire_dtype)
            tensors = [each.launched for each in kept]
        weight = weigh and weigh(state)
        format = self._deslo.wire.format_of(state)
        if format and self._sync.transport.replicas > 1:
            packed = self._wire.pack(cohort, state, seats, tensors, format)
            flight = self._sync.start_quantized(cohort.steps, state, keys, packed, weight)
        else:
            flight = self._sync.start(cohort.steps, state, keys, tensors, weight)
        if kept:
            flight.launched, flight.remains = tensors, [each.remains for each in kept]
        if state in adaptive(cohort.group["sync_every"]):
            flight.square = self._variance.start(tensors)
        self._table.put(flight)
        return flight

    def ask(self, due: Due, moved: bool) -> list[Answer]:
        """What all replicas say of each cohort before it lands; drops what must not land. Collective.

        ``moved``: this replica trains other parameters than those that average.
        """
        questions = []
        for cohort, states in due:
            says = MOVED if moved and PARAMS in states else self._says(cohort, states)
            flights = {state: self._flight_of(cohort, state) for state in states}
            questions.append(self._recall.ask(cohort.steps, states, flights, says))
        answers = [question.answer() for question in questions]
        for (cohort, states), answer in zip(due, answers):
            if answer.written:
                self.drop(cohort, states, answer)
        return answers

    def drop(self, cohort: Cohort, states: Iterable[str], answer: Answer) -> None:
        """Waits for what flies of these and forgets it: what was sent in vain is counted in ``answer``."""
        for state in states:
            self._resumed.drop(cohort.keys, state)
            for flight in self._table.drop(cohort.keys, state):
                answer.bytes[state] += flight.bytes
                flight.finish()

    def _says(self, cohort: Cohort, states: States) -> float | None:
        """Whether what flies must not land, by what this replica knows without looking at values; None: they decide."""
        if not self._deslo.overlap_comm:
            return 0.0
        if self._deslo.sync_delay == 1:
            return None
        return 0.0 if all(self._holds(cohort.keys, state) for state in states) else WRITTEN

    def _holds(self, keys: Sequence[Key], state: str) -> bool:
        """Whether all of it was launched, here or before a resume, and has not landed."""
        grounded = [key for key, seat in zip(keys, self._table.seats(keys, state)) if seat is None]
        return self._resumed.holds(grounded, state)

    def _flight_of(self, cohort: Cohort, state: str) -> Flight | None:
        """The flight of just these parts in this order, if there is one."""
        seats = self._table.seats(cohort.keys, state)
        flight = seats[0] and seats[0][0]
        whole = flight and len(flight.keys) == len(seats) and seats == [(flight, i) for i in range(len(seats))]
        return flight if whole else None

    def complete(self, due: Due) -> list[Landing]:
        """Launches what is to land and does not fly yet; what lands."""
        for cohort, states in due:
            for state, tensors in states.items():
                absent = [i for i, seat in enumerate(self._table.seats(cohort.keys, state)) if seat is None]
                if absent:
                    self._sync.announce(cohort.steps)
                    self._start(cohort, state, tensors, absent)
        return [
            Landing(cohort, states, {state: self._table.take(cohort.keys, state) for state in states})
            for cohort, states in due
        ]

    def land(self, landing: Landing, answer: Answer) -> dict[str, list[Tensor]] | None:
        """The means, as ``Synchronizer.land`` gives them."""
        means = self._sync.land(landing.cohort.steps, landing.seats, landing.launched, answer)
        if means is None:
            for flight in (flight for state in landing.seats for flight in landing.flights(state)):
                flight.finish()
        return means

    def adapt(self, landing: Landing, means: States, states: Mapping[Tensor, MutableMapping[str, Any]]) -> None:
        """Lets the drift that an average has found choose the periods of its adaptive states from now on: in its
        cohort, and in the ``states`` of its parameters. The same on every rank. Collective where periods adapt."""
        cohort = landing.cohort
        for state, bounds in adaptive(cohort.group["sync_every"]).items():
            if state not in means:
                continue
            drift = self._variance.land(cohort.steps, landing.flights(state), means[state])
            before = require(cohort.periods[state])
            period = cohort.periods[state] = bounds.after(cohort.steps, before, drift)
            for param in cohort.params:
                states[param][period_key(state)] = torch.tensor(period, device="cpu")
            if period != before:
                log_rank0(
                    f"deslo: {state} is averaged every {period} steps now, after step {cohort.steps} found drift "
                    f"{drift:.3g} at every {before} ({bounds})"
                )

    def decay(self, params: Sequence[Tensor], factors: Mapping[str, float]) -> None:
        """An update of ``params`` was made, which leaves ``factors[state]`` of an earlier value of each state."""
        delayed.decay(self._table, params, factors)
        self._resumed.decay(params, factors)

    def abandon(self) -> None:
        """Drops all of it."""
        for flight in self._table:
            flight.finish()
        self._table.clear()
        self._resumed.clear()

    def saved(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """What flies and changes meanwhile, and in how many ``fragments``: place in ``params``, fragment, state,
        launched value on the CPU, what remains."""
        place = {param: index for index, param in enumerate(params)}
        flying = [
            (key, flight.state, value, remains)
            for flight in self._table
            if flight.launched is not None
            for key, value, remains in zip(flight.keys, flight.launched, flight.remains)
        ]
        parts = [
            (*((place[key[0]], key[1]) if isinstance(key, tuple) else (place[key], 0)), state, value.cpu(), remains)
            for key, state, value, remains in [*flying, *self._resumed.items()]
        ]
        return {"fragments": self._deslo.fragments, "parts": parts}

    def load(self, params: Sequence[Tensor], saved: Mapping[str, Any]) -> None:
        """Makes what was ``saved`` fly: launched once more when it is to land, from the same values. Raises
        ``ConfigError`` where that was cut into other fragments."""
        cut = self._deslo.fragments > 1
        if saved["parts"] and saved["fragments"] != self._deslo.fragments:
            raise ConfigError(
                "deslo.fragments",
                f"{saved['fragments']}, in which averages of the checkpoint were under way (deslo.sync_delay)",
                str(self._deslo.fragments),
                "resume with as many, or save where no average is under way",
            )
        self._resumed.load(
            ((params[i], fragment) if cut else params[i], state, value.to(params[i].device), remains)
            for i, fragment, state, value, remains in saved["parts"]
        )
