"""What communication costs: laps of contestants, held against laps without communication and against the plan.

A *lap* is half a period K of steps, from one barrier to the next, and begins a quarter of a period after an average, so
that each average is launched and landed within one lap. Laps of all contestants take turns; each is compared with laps
of its floor in the rounds around it. Laps that move the same bytes are alike: of these the median counts, once for each
of them, so that the sum over a whole longest period is that of a mean. Laps in which somebody else used the machine
count only where a contestant has none alike without.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.slow_link.network import WIRE_PER_PAYLOAD
from benchmarks.slow_link.others import QUIET

NODES = 2
RING = 2 * (NODES - 1) / NODES  # a ring all-reduce of b bytes sends so many times b from each node


@dataclass(frozen=True)
class Segment:
    """A lap on one rank. Times are of the machine's monotonic clock, which all ranks share.

    ``payload`` has an entry for each step: what this rank hands to the reductions between nodes that belong to it.
    ``waited``: the seconds that the contestant's own meter counted, where it has one.
    """

    start: float
    ends: list[float]
    payload: list[int]
    waited: float

    @property
    def steps(self) -> list[float]:
        return [end - begin for begin, end in zip([self.start, *self.ends], self.ends)]


@dataclass(frozen=True)
class Lap:
    """A lap on all ranks: seconds until the last was done, and bytes by node. ``sent`` is what the counters saw,
    ``others`` the share of all cores that somebody else used."""

    round: int
    seconds: float
    steps: list[float]
    payload: tuple[int, ...]
    waited: float
    sent: float
    others: float

    @property
    def disturbed(self) -> bool:
        return self.others > QUIET

    @property
    def wire(self) -> float:
        """Bytes that a node should put on the cable: payload, as a ring sends it, and headers."""
        return self.moved * RING * WIRE_PER_PAYLOAD

    @property
    def moved(self) -> int:
        return sum(self.payload)


def lap(round: int, segments: Sequence[Segment], sent: Sequence[int], others: float) -> Lap:
    """``segments`` of all ranks; ``sent`` by each node."""
    return Lap(
        round=round,
        seconds=max(each.ends[-1] for each in segments) - min(each.start for each in segments),
        steps=[seconds for each in segments for seconds in each.steps],
        payload=tuple(sum(step) // NODES for step in zip(*(each.payload for each in segments))),
        waited=sum(each.waited for each in segments) / len(segments),
        sent=sum(sent) / NODES,
        others=others,
    )


@dataclass(frozen=True)
class Row:
    """One contestant at one rate. Shares are of a floor step's time; bytes are of one node, by step.

    ``exposed`` is what was measured, ``inevitable`` what is left of the payload's time on the link once a contestant
    that hides it has hidden a step's worth of each average (None on a link of unknown rate); ``waited`` is by its own
    meter.
    ``disturbed``: the share of laps in which somebody else used the machine.
    """

    name: str
    step_ms: float
    floor_ms: float
    exposed: float
    inevitable: float | None
    waited: float
    bytes: float
    planned: float
    disturbed: float
    rounds: list[float]

    @property
    def mean_ms(self) -> float:
        return self.floor_ms * (1 + self.exposed)


def row(name: str, laps: Sequence[Lap], floor: Sequence[Lap], *, hides: bool, mbit: float | None) -> Row:
    """``laps`` over whole longest periods, against the ``floor`` laps of the rounds around them."""
    beside = [_around(each.round, floor) for each in laps]
    excess = [_per_step(each) / median(map(_per_step, rest)) - 1 for each, rest in zip(laps, beside)]
    disturbed = [each.disturbed or all(other.disturbed for other in rest) for each, rest in zip(laps, beside)]
    step = median(map(_per_step, _quiet(floor)))
    steps = sum(len(each.payload) for each in laps)
    return Row(
        name=name,
        step_ms=1e3 * median(seconds for each in _quiet(laps) for seconds in each.steps),
        floor_ms=1e3 * step,
        exposed=_mean_of_medians(laps, excess, disturbed),
        inevitable=None
        if mbit is None
        else sum(_left(each, mbit, step if hides else 0) for each in laps) / steps / step,
        waited=_mean_of_medians(laps, [each.waited / len(each.payload) / step for each in laps], disturbed),
        bytes=sum(each.sent for each in laps) / steps,
        planned=sum(each.wire for each in laps) / steps,
        disturbed=sum(disturbed) / len(laps),
        rounds=[round(each, 4) for each in excess],
    )


def unsettled(laps: Sequence[Lap]) -> bool:
    """Whether somebody else used the machine in all laps that move some number of bytes."""
    return {each.moved for each in laps} != {each.moved for each in laps if not each.disturbed}


def _around(index: int, floor: Sequence[Lap]) -> Sequence[Lap]:
    """The five laps nearest in time, without the disturbed if that leaves any: the machine's speed drifts, and laps
    scatter."""
    return sorted(_quiet(floor), key=lambda each: abs(each.round - index))[:5]


def _mean_of_medians(laps: Sequence[Lap], values: Sequence[float], disturbed: Sequence[bool]) -> float:
    alike: Mapping[int, list[tuple[bool, float]]] = defaultdict(list)
    for each, busy, value in zip(laps, disturbed, values):
        alike[each.moved].append((busy, value))
    total = 0.0
    for pairs in alike.values():
        quiet = [value for busy, value in pairs if not busy]
        total += len(pairs) * median(quiet or [value for _, value in pairs])
    return total / len(laps)


def _quiet(laps: Sequence[Lap]) -> Sequence[Lap]:
    return [each for each in laps if not each.disturbed] or laps


def _per_step(each: Lap) -> float:
    return each.seconds / len(each.payload)


def _left(each: Lap, mbit: float, hidden: float) -> float:
    """Seconds of a lap in which the link is still busy after ``hidden`` seconds of each step's averages."""
    per_byte = RING * WIRE_PER_PAYLOAD * 8 / (mbit * 1e6)
    return sum(max(0.0, payload * per_byte - hidden) for payload in each.payload)
