"""May what flies land? Asked of all replicas by one small average, whenever something is due, as everything lands or
nothing.

An average is launched at the end of a step and lands at the begin of the next. What a script writes into the states
meanwhile (clamped weights, rows that start anew, a load), on one replica or on all, would be lost under the mean of
what was launched. So each replica compares what there is with what it launched, by a fingerprint. If any finds another,
or has nothing in flight, all drop what flies and average what is there now: overlap changes no result.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """For each parameter and state whose average flies, what was launched."""

    def __init__(self, average: Transport, wire_dtype: torch.dtype):
        self.transport, self.wire_dtype = average, wire_dtype
        self._launched: dict[tuple[Tensor, str], tuple[int, list[Tensor], Tensor]] = {}  # by a cohort's first parameter

    def launched(self, steps: int, params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]]) -> None:
        """Notes what ``states`` are, which are launched once ``steps`` steps are complete."""
        for state, tensors in states.items():
            self._launched[params[0], state] = steps, list(params), fingerprint(tensors)

    def ask(
        self,
        steps: int,
        params: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        *,
        written: bool | None,
        moved: bool,
    ) -> Question:
        """Starts the question about ``states``, which are to land. ``written``: what this replica finds; None: it
        compares."""
        (some, *_), divisor = states.values(), self.transport.divisor
        if self.transport.progress:
            # who has not come to the question is named as one who misses an average
            self.transport.progress.launching(steps)
        mine = torch.zeros((), dtype=self.wire_dtype, device=some[0].device)
        if moved:
            mine.fill_(MOVED)
        elif written is None:
            mine = self._differs(steps, params, states, mine)
        elif written:
            mine.fill_(WRITTEN)
        chunk = mine.repeat(divisor)  # where ranks hold copies each sends its own word, and knows all of them then
        return Question(self.transport, next(iter(states)), chunk, self.transport.start(chunk))

    def _differs(
        self, steps: int, params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]], mine: Tensor
    ) -> Tensor:
        """1 if any of ``states`` is not what was launched for ``steps``, else 0. Not read here: no device is waited
        for."""
        for state, tensors in states.items():
            before = self._launched.pop((params[0], state), None)
            if before is None or before[0] != steps or [*map(id, before[1])] != [*map(id, params)]:
                return torch.full_like(mine, WRITTEN)
            mine = torch.maximum(mine, (before[2] != fingerprint(tensors)).to(mine.dtype))
        return mine

    def forget(self) -> None:
        """Nothing flies any more."""
        self._launched.clear()
