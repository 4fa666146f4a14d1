"""Starts averages of states and lands them: between the transport and the optimizer."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from deslo_plugin.averaging.cohort import Key
from deslo_plugin.averaging.flight import Flight, Seat, States
from deslo_plugin.averaging.instants import now, seconds_between
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.recall import Answer
from deslo_plugin.averaging.wire_states import Packed
from deslo_plugin.comm.buckets import pack
from deslo_plugin.comm.sample_weights import WeighedBucket, start_weighted
from deslo_plugin.comm.transport import Transport
from deslo_plugin.errors import NonFiniteError
from deslo_plugin.kernels.drift import Drift, drift_of, measure

NOTHING_ASKED = Answer()


class Synchronizer:
    """Averages states over replicas, on copies: ``start`` starts, ``land`` waits and returns means."""

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

    def announce(self, steps: int) -> None:
        """Says that averages of the states after ``steps`` steps start now."""
        if self.transport.progress:
            self.transport.progress.launching(steps)

    @torch.profiler.record_function("deslo::launch")
    def start(
        self, steps: int, state: str, keys: Sequence[Key], tensors: Sequence[Tensor], weight: float | None = None
    ) -> Flight:
        """Packs copies of ``tensors``, which ``keys`` name, and starts their average.

        With ``weight`` replicas count by what they have seen, else alike.
        """
        bucket = pack(tensors, self.wire_dtype, self.bucket_bytes, self.transport.divisor)
        start = now(tensors[0].device)
        sent = sum(chunk.nbytes for chunk in bucket.chunks) // self.transport.divisor
        if weight is None:
            works = [self.transport.start(chunk) for chunk in bucket.chunks]
        else:
            works = start_weighted(self.transport, weight, bucket.chunks, self.wire_dtype, tensors[0].device)
            sent += self.wire_dtype.itemsize
        return Flight(steps, state, keys, bucket, works, sent, start)

    @torch.profiler.record_function("deslo::launch")
    def start_quantized(
        self, steps: int, state: str, keys: Sequence[Key], packed: Packed, weight: float | None = None
    ) -> Flight:
        """Starts the average of what is ``packed``, in few bits both ways."""
        start = now(packed.values[0].device)
        total = None if weight is None else self.transport.total(weight)
        bucket, work = self.transport.start_quantized(*packed, total)
        if weight is not None:
            work = WeighedBucket(self.transport, weight, bucket, work)
        return Flight(steps, state, keys, bucket, [work], bucket.nbytes, start)

    @torch.profiler.record_function("deslo::land")
    def land(
        self, steps: int, seats: Mapping[str, Sequence[Seat]], launched: States, told: Answer = NOTHING_ASKED
    ) -> dict[str, list[Tensor]] | None:
        """Waits for the flights of ``seats``, which left once ``steps`` steps were complete with the values
        ``launched``, and returns the means in wire dtype.

        What ``told`` has cost is counted with it. None if they did not arrive everywhere: then nobody writes them.
        Raises ``NonFiniteError`` everywhere if any replica brought NaN or inf, ``AverageError`` on a time-out.
        """
        flights = {state: list(dict.fromkeys(flight for flight, _ in taken)) for state, taken in seats.items()}
        devices = {state: tensors[0].device for state, tensors in launched.items()}  # an optimizer may offload some
        first = next(iter(devices.values()))
        start = now(first)
        with torch.profiler.record_function("deslo::wait"):
            for flight in (flight for each in flights.values() for flight in each):
                if flight.steps != steps:
                    raise RuntimeError(f"an average launched for step {flight.steps} was about to land at step {steps}")
                flight.wait()
        if not self.transport.should_commit():
            return None
        arrived = {device: now(device) for device in set(devices.values())}
        means = {state: [flight.bucket.views[seat] for flight, seat in taken] for state, taken in seats.items()}
        sums = {state: measure(launched[state], mean) for state, mean in means.items()}
        drift = dict(zip(sums, map(drift_of, torch.stack([each.to(first) for each in sums.values()]).tolist())))
        self._refuse_nonfinite(steps, flights, launched, drift)

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
    def mean(self, steps: int, states: States, dtype: torch.dtype | None = None) -> dict[str, list[Tensor]]:
        """The means of ``states`` in ``dtype``, by default the wire's, launched and waited for, whatever they hold."""
        self.announce(steps)
        device = next(iter(states.values()))[0].device
        start, means, sent = now(device), {}, {}
        for state, tensors in states.items():
            bucket = pack(tensors, dtype or self.wire_dtype, self.bucket_bytes, self.transport.divisor)
            for work in [self.transport.start(chunk) for chunk in bucket.chunks]:
                work.wait()
            means[state] = bucket.views
            sent[state] = sum(chunk.nbytes for chunk in bucket.chunks) // self.transport.divisor
        seconds = seconds_between(start, now(device))
        self._on_average(SyncEvent(steps, sent, seconds, {}, dict.fromkeys(states, seconds)))
        return means

    def _refuse_nonfinite(
        self, steps: int, flights: Mapping[str, list[Flight]], states: States, drift: Mapping[str, Drift]
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


def _proves_finite(drift: Drift, flights: Sequence[Flight], taken: int) -> bool:
    """Whether no element of ``flights`` is NaN or infinite because the drift of the ``taken`` means is finite.

    It may be infinite with finite means, whose squares overflow, and says nothing of means that land at another time.
    """
    return isfinite(drift.distance) and taken == sum(len(flight.bucket.views) for flight in flights)


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    norms = torch._foreach_norm(tensors, float("inf")) if tensors else ()
    return not norms or bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all())
