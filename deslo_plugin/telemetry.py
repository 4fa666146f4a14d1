"""What averaging has cost so far: bytes, events and exposed seconds, counted where they are spent."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SyncEvent:
    """One average: after ``steps`` completed steps, ``bytes`` by state sent by this rank, seconds waited for it."""

    steps: int
    bytes: dict[str, int]
    seconds_exposed: float


@dataclass
class Meter:
    """Sums of ``SyncEvent``: an ``emit`` callback of the synchroniser."""

    bytes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    seconds_exposed: float = 0.0
    skipped_steps: int = 0
    _counted: dict[str, int] = field(default_factory=dict)

    def __call__(self, event: SyncEvent) -> None:
        self.bytes.update(event.bytes)
        # param groups and ZeRO's sub-groups land one after the other: together they are one event of the state
        new = [state for state in event.bytes if self._counted.get(state) != event.steps]
        self.events.update(new)
        self._counted.update(dict.fromkeys(new, event.steps))
        self.seconds_exposed += event.seconds_exposed
