"""The record of one average under way: a state of some parameters, from its launch until it lands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.averaging.cohort import Cohort, Key
from deslo_plugin.averaging.instants import Instant
from deslo_plugin.comm.buckets import Bucket
from deslo_plugin.comm.transport import Quantized, Work
from deslo_plugin.errors import require

States = Mapping[str, Tensors]
"""State name -> that state of each parameter of a cohort, in the cohort's order."""
Weigh = Callable[[str], float]
"""What this rank has seen since that state's last average."""


@dataclass(eq=False)
class Flight:
    """``state`` of the parts ``keys`` once ``steps`` steps were complete; ``bucket`` holds their means when all
    ``works`` are done.

    ``fingerprint`` is that of what was launched, where a script may write into it before the mean lands (``recall``).
    ``launched`` are copies of it and ``remains`` what updates have left of a difference since, where the average takes
    several steps (``delayed``). ``square`` travels beside a state whose period adapts (``replica_variance``)."""

    steps: int
    state: str
    keys: Sequence[Key]
    bucket: Bucket | Quantized
    works: list[Work]
    bytes: int
    start: Instant
    fingerprint: Tensor | None = None
    launched: Tensors | None = None
    remains: list[float] = field(default_factory=list)
    square: tuple[Tensor, Work] | None = None

    def wait(self) -> None:
        for work in self.works:
            work.wait()

    def finish(self) -> None:
        """Waits for all of it, whatever has become of it."""
        self.wait()
        if self.square:
            self.square[1].wait()


Seat = tuple[Flight, int]
"""A flight, and the place of a part in it."""


@dataclass(frozen=True)
class Landing:
    """What lands in ``states`` of ``cohort``: ``seats`` of each state, by part."""

    cohort: Cohort
    states: States
    seats: Mapping[str, list[Seat]]

    @property
    def launched(self) -> States:
        """The values of which the means are: ``states`` themselves, where nothing may have changed them since."""
        return {
            state: self.states[state]
            if seats[0][0].launched is None
            else [require(flight.launched)[i] for flight, i in seats]
            for state, seats in self.seats.items()
        }

    def flights(self, state: str) -> list[Flight]:
        return list(dict.fromkeys(flight for flight, _ in self.seats[state]))

    def carry(self) -> None:
        """Lets what travelled in few bits keep what all replicas have in common now, and what was lost: before means
        are written over what was launched."""
        for state, seats in self.seats.items():
            for flight in self.flights(state):
                if not isinstance(flight.bucket, Bucket):
                    flight.bucket.carry([seat for each, seat in seats if each is flight])


class FlightTable:
    """What is under way, by part and state."""

    def __init__(self) -> None:
        self._seats: dict[tuple[Key, str], Seat] = {}

    def __iter__(self) -> Iterator[Flight]:
        return iter(dict.fromkeys(flight for flight, _ in self._seats.values()))

    def put(self, flight: Flight) -> None:
        for seat, key in enumerate(flight.keys):
            self._seats[key, flight.state] = flight, seat

    def seats(self, keys: Sequence[Key], state: str) -> list[Seat | None]:
        """Of each part, or None where it does not fly."""
        return [self._seats.get((key, state)) for key in keys]

    def take(self, keys: Sequence[Key], state: str) -> list[Seat]:
        """The seats of parts that fly; they do not any more."""
        return [self._seats.pop((key, state)) for key in keys]

    def drop(self, keys: Sequence[Key], state: str) -> list[Flight]:
        """Forgets the parts, and returns the flights that they were in."""
        taken = [self._seats.pop((key, state), None) for key in keys]
        return list(dict.fromkeys(seat[0] for seat in taken if seat))

    def clear(self) -> None:
        self._seats.clear()
