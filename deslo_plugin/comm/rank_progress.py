"""What a rank says of itself in the store of the world, and how the store is asked without waiting for a dead host."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RankProgress:
    """What a rank says of itself: ``launches`` of averages so far, the last one after ``steps`` steps, ``at`` (seconds
    since the epoch), at ``rate`` steps per second, the last launch that it has ``given_up``, how many ``calls`` it has
    made that every rank must make, ``inside`` which it is now, and how many ``changes`` of what is averaged."""

    launches: int = 0
    steps: int = 0
    at: float = 0.0
    rate: float | None = None
    given_up: int = 0
    calls: int = 0
    inside: str = ""
    changes: int = 0


def describe_last(note: RankProgress) -> str:
    """When a rank was last heard of, by the clocks of the two hosts."""
    ago = f"{max(0.0, time.time() - note.at):.1f} s ago"
    last = (
        f"its last average was after step {note.steps}, {ago}" if note.launches else f"no average yet, attached {ago}"
    )
    return last + (f"; it is in {note.inside}, which every rank must call" if note.inside else "")


def within(seconds: float, ask: Callable[[], Answer]) -> Answer | None:
    """What ``ask`` returns; None if it fails, or takes longer, in which case its thread is left to it."""
    answers: SimpleQueue[Answer | None] = SimpleQueue()

    def answer() -> None:
        try:
            answers.put(ask())
        except RuntimeError:
            answers.put(None)

    Thread(target=answer, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return None
