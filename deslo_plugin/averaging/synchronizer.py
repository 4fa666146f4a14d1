"""Launching an average and landing it: the motion between ``collectives`` and the optimizer."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from deslo_plugin.averaging.instants import Instant, now, seconds_between
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.recall import Answer
from deslo_plugin.comm.buckets import Bucket, pack
from deslo_plugin.comm.sample_weights import start_weighted
from deslo_plugin.comm.transport import Transport, Work
from deslo_plugin.errors import NonFiniteError
from deslo_plugin.kernels.drift import Drift, drift_of, measure

States = Mapping[str, Sequence[Tensor]]
"""State name -> that state of each parameter of a cohort, in the cohort's order."""
Weigh = Callable[[str], float]
"""What this rank has seen since that state's last average."""
NOTHING_ASKED = Answer()


@dataclass(frozen=True)
class _Flight:
    steps: int
    bucket: Bucket
    works: list[Work]
    bytes: int
    start: Instant


class Synchronizer:
    """Averages cohorts of parameters over replicas, on copies: ``launch`` starts, ``land`` waits and returns means.

    A cohort is named by its parameters, so that frameworks may step their groups one by one.
    """

    def __init__(
        self,
        average: Transport,
        *,
        wire_dtype: torch.dtype,
        bucket_bytes: int,
        on_average: Callable[[SyncEvent], object],
    ):
        self.transport, self.wire_dtype, self.bucket_bytes, self._on_average = (
            average,
            wire_dtype,
            bucket_bytes,
            on_average,
        )
        self._flights: dict[tuple[Tensor, str], tuple[_Flight, int]] = {}  # (parameter, state) -> flight, seat

    def launch(self, steps: int, params: Sequence[Tensor], states: States, weigh: Weigh | None = None) -> None:
        """Packs copies of ``states`` and starts their averages, to land once ``steps`` steps are complete.

        With ``weigh`` replicas count by what they have seen, else alike.
        """
        self._tell(steps, states)
        for state, tensors in states.items():
            flight = self._start(steps, tensors, weigh and weigh(state))
            for seat, param in enumerate(params):
                self._flights[param, state] = flight, seat

    @torch.profiler.record_function("deslo::launch")
    def _start(self, steps: int, tensors: Sequence[Tensor], weight: float | None) -> _Flight:
        bucket = pack(tensors, self.wire_dtype, self.bucket_bytes, self.transport.divisor)
        start = now(tensors[0].device)
        sent = sum(chunk.nbytes for chunk in bucket.chunks) // self.transport.divisor
        if weight is None:
            return _Flight(steps, bucket, [self.transport.start(chunk) for chunk in bucket.chunks], sent, start)
        works = start_weighted(self.transport, weight, bucket.chunks, self.wire_dtype, tensors[0].device)
        return _Flight(steps, bucket, works, sent + self.wire_dtype.itemsize, start)

    @torch.profiler.record_function("deslo::land")
    def land(
        self, steps: int, params: Sequence[Tensor], states: States, told: Answer = NOTHING_ASKED
    ) -> dict[str, list[Tensor]] | None:
        """Waits for what was launched for ``steps``, launches what was not, and returns the means in wire dtype.

        What ``told`` has cost is counted with it. None if they did not arrive everywhere: then nobody writes them.
        Raises ``NonFiniteError`` everywhere if any replica brought NaN or inf, ``AverageError`` on a time-out.
        """
        self.launch_absent(steps, params, states)
        seats = {state: [self._flights.pop((param, state)) for param in params] for state in states}
        flights = {state: list({id(flight): flight for flight, _ in taken}.values()) for state, taken in seats.items()}

        devices = {state: tensors[0].device for state, tensors in states.items()}  # an optimizer may offload some
        first = next(iter(devices.values()))
        start = now(first)
        with torch.profiler.record_function("deslo::wait"):
            for flight in (flight for each in flights.values() for flight in each):
                if flight.steps != steps:
                    raise RuntimeError(f"an average launched for step {flight.steps} was about to land at step {steps}")
                for work in flight.works:
                    work.wait()
        if not self.transport.should_commit():
            return None
        arrived = {device: now(device) for device in set(devices.values())}
        means = {state: [flight.bucket.views[seat] for flight, seat in taken] for state, taken in seats.items()}
        sums = {state: measure(states[state], mean) for state, mean in means.items()}
        drift = dict(zip(sums, map(drift_of, torch.stack([each.to(first) for each in sums.values()]).tolist())))
        self._refuse_nonfinite(steps, flights, states, drift)

        sent = Counter({state: sum(flight.bytes for flight in each) for state, each in flights.items()})
        sent.update(told.bytes)
        flown = {
            state: max(seconds_between(flight.start, arrived[devices[state]]) for flight in each)
            for state, each in flights.items()
        }
        waited = seconds_between(start, arrived[first]) + told.seconds
        self._on_average(SyncEvent(steps, dict(sent), waited, drift, flown))
        return means

    @torch.profiler.record_function("deslo::mean")
    def mean(self, steps: int, states: States) -> dict[str, list[Tensor]]:
        """The means of ``states`` in wire dtype, launched and waited for, whatever they hold."""
        self._tell(steps, states)
        device = next(iter(states.values()))[0].device
        start, means, sent = now(device), {}, {}
        for state, tensors in states.items():
            bucket = pack(tensors, self.wire_dtype, self.bucket_bytes, self.transport.divisor)
            for work in [self.transport.start(chunk) for chunk in bucket.chunks]:
                work.wait()
            means[state] = bucket.views
            sent[state] = sum(chunk.nbytes for chunk in bucket.chunks) // self.transport.divisor
        seconds = seconds_between(start, now(device))
        self._on_average(SyncEvent(steps, sent, seconds, {}, dict.fromkeys(states, seconds)))
        return means

    def drop(self, params: Sequence[Tensor], states: Iterable[str]) -> Counter[str]:
        """Waits for what flies of these and forgets it: state -> bytes that were sent in vain."""
        sent: Counter[str] = Counter()
        keys = [(param, state) for param in params for state in states if (param, state) in self._flights]
        for flight, state in {id(self._flights[key][0]): (self._flights[key][0], key[1]) for key in keys}.values():
            sent[state] += flight.bytes
            for work in flight.works:
                work.wait()
        for key in keys:
            del self._flights[key]
        return sent

    def abandon(self) -> None:
        """Waits for all that flies and forgets it: after a load, averages start from the loaded values."""
        for flight in {id(flight): flight for flight, _ in self._flights.values()}.values():
            for work in flight.works:
                work.wait()
        self._flights.clear()

    def _tell(self, steps: int, states: States) -> None:
        if states and self.transport.progress:
            self.transport.progress.launching(steps)

    def launch_absent(self, steps: int, params: Sequence[Tensor], states: States, weigh: Weigh | None = None) -> None:
        """Launches those of ``states`` that do not fly yet."""
        for state, tensors in states.items():
            absent = [i for i, param in enumerate(params) if (param, state) not in self._flights]
            if absent:
                self.launch(steps, [params[i] for i in absent], {state: [tensors[i] for i in absent]}, weigh)

    def _refuse_nonfinite(
        self, steps: int, flights: Mapping[str, list[_Flight]], states: States, drift: Mapping[str, Drift]
    ) -> None:
        bad = [
            s
            for s, each in flights.items()
            if not _proves_finite(drift[s], each, len(states[s])) and not all(finite(f.bucket.chunks) for f in each)
        ]
        if not self.transport.any(bool(bad)):
            return
        mine = not all(finite(tensors) for tensors in states.values())
        ranks = self.transport.culprits(mine)
        raise NonFiniteError(
            f"average of {', '.join(bad or states)} after step {steps}: expected finite values, got NaN or inf from "
            f"rank(s) {ranks}; nothing was written and every rank stops here: resume from the last checkpoint with a "
            'lower lr or clipping, or set deslo.on_nonfinite to "skip" to leave out steps with broken gradients'
        )


def _proves_finite(drift: Drift, flights: Sequence[_Flight], taken: int) -> bool:
    """Whether no element of ``flights`` is NaN or infinite because the drift of the ``taken`` means is finite.

    It may be infinite with finite means, whose squares overflow, and says nothing of means that land at another time.
    """
    return isfinite(drift.distance) and taken == sum(len(flight.bucket.views) for flight in flights)


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    norms = torch._foreach_norm(tensors, float("inf")) if tensors else ()
    return not norms or bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all())
