"""What averaging has cost so far, counted where it is spent (bytes, events, exposed seconds), and what it has found:
drift."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from deslo_plugin.kernels.drift import Drift


@dataclass(frozen=True)
class SyncEvent:
    """One average: after ``steps`` completed steps, ``bytes`` sent by this rank and ``drift`` found, both by state, and
    the seconds waited for it. ``seconds_in_flight``: by state, from its launch until it was here and looked at."""

    steps: int
    bytes: dict[str, int]
    seconds_exposed: float
    drift: dict[str, Drift]
    seconds_in_flight: dict[str, float] = field(default_factory=dict)


@dataclass
class Meter:
    """Sums of ``SyncEvent``, and the latest drift of each state: an ``on_average`` callback of the synchroniser.

    ``steps`` are those taken since this process attached, whatever the clock said then.

    ``refused_averages`` did not arrive at every replica and were written by none, where replicas may come and go.
    ``failed_checks`` are kinds of mistakes that ``attachment.check()``, or the watch over the first averages, has
    found."""

    bytes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    seconds_exposed: float = 0.0
    steps: int = 0
    skipped_steps: int = 0
    refused_averages: int = 0
    failed_checks: int = 0
    drift: dict[str, Drift] = field(default_factory=dict)
    _counted: dict[str, int] = field(default_factory=dict)  # state -> steps taken at its last average
    _stepped: set[int] = field(default_factory=set)

    def __call__(self, event: SyncEvent) -> None:
        self.bytes.update(event.bytes)
        # param groups and ZeRO's sub-groups land one after the other: together they are one event of the state
        new = [state for state in event.bytes if self._counted.get(state) != self.steps]
        self.events.update(new)
        self._counted.update(dict.fromkeys(new, self.steps))
        self.seconds_exposed += event.seconds_exposed
        self.drift.update(event.drift)

    def tick(self, params: Iterable[int]) -> None:
        """A step of ``params`` begins, which are named by their ids: a framework may call for each param group, and the
        next step is where one comes again."""
        params = set(params)
        if not self._stepped.isdisjoint(params) or not self._stepped or not params:
            self.steps += 1
            self._stepped.clear()
        self._stepped |= params
