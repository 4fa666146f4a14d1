"""May what flies land? Asked of all replicas by one small average, whenever something is due, as everything lands or
nothing.

An average is launched at the end of a step and lands at the begin of the next. What a script writes into the states
meanwhile (clamped weights, rows that start anew, a load), on one replica or on all, would be lost under the mean of
what was launched. So each replica compares what there is with what it launched, by a fingerprint. If any finds another,
or has nothing in flight, all drop what flies and average what is there now: overlap changes no result.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deslo_plugin.averaging.flight import Flight, States
from deslo_plugin.averaging.instants import now, seconds_between
from deslo_plugin.comm.transport import Transport, Work
from deslo_plugin.kernels.fingerprint import fingerprint

WRITTEN = 1.0  # a replica's states are not those that it launched
MOVED = 2.0**20  # a replica trains other parameters than before: one is enough to make the mean of a million exceed 1


@dataclass(frozen=True)
class Answer:
    """What replicas said before an average: ``written`` and ``moved`` hold on any of them. ``seconds`` were waited for
    it, and ``bytes`` sent beside the average or in vain, by state."""

    written: bool = False
    moved: bool = False
    seconds: float = 0.0
    bytes: Counter[str] = field(default_factory=Counter)

    def joined(self, other: "Answer") -> "Answer":
        """Both as one."""
        return Answer(
            self.written or other.written,
            self.moved or other.moved,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class Question:
    transport: Transport
    state: str
    chunk: Tensor
    work: Work

    def answer(self) -> Answer:
        """Waits for it. The same on every rank. Collective over the replica's ranks. Raises ``AverageError`` on a
        time-out."""
        start = now(self.chunk.device)
        self.work.wait()
        arrived = now(self.chunk.device)
        said = float(self.chunk.max())
        written, moved = (self.transport.any(each) for each in (said != 0, said > 1))
        sent = Counter({self.state: self.chunk.element_size()})
        return Answer(written, moved, seconds_between(start, arrived), sent)


class Recall:
    """Asks about what was launched by the fingerprints that flights carry."""

    def __init__(self, average: Transport, wire_dtype: torch.dtype):
        self.transport, self.wire_dtype = average, wire_dtype

    def ask(self, steps: int, states: States, flights: Mapping[str, Flight | None], says: float | None) -> Question:
        """Starts the question about ``states``, which are to land: the average of what this replica ``says`` (0,
        ``WRITTEN``, ``MOVED``).

        None: it compares with ``flights``, those in which just these parts of each state travel."""
        (some, *_), divisor = states.values(), self.transport.divisor
        if self.transport.progress:
            # who has not come to the question is named as one who misses an average
            self.transport.progress.launching(steps)
        mine = torch.full((), says or 0.0, dtype=self.wire_dtype, device=some[0].device)
        if says is None:
            mine = _differs(steps, states, flights, mine)
        chunk = mine.repeat(divisor)  # where ranks hold copies each sends its own word, and knows all of them then
        return Question(self.transport, next(iter(states)), chunk, self.transport.start(chunk))


def _differs(steps: int, states: States, flights: Mapping[str, Flight | None], nothing: Tensor) -> Tensor:
    """``WRITTEN`` if any of ``states`` is not what was launched for ``steps``, else ``nothing``. Not read here: no
    device is waited for."""
    found = nothing
    for state, tensors in states.items():
        flight = flights[state]
        if flight is None or flight.steps != steps or flight.fingerprint is None:
            return torch.full_like(nothing, WRITTEN)
        found = torch.maximum(found, (flight.fingerprint != fingerprint(tensors)).to(nothing.dtype))
    return found
