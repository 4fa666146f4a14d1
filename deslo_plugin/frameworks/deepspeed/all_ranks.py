"""Do all ranks build this engine with our block? Asked by notes in the world's store, so that others join no collective
of ours.

An engine that is not ours leaves a note and goes on as DeepSpeed alone: nothing is sent to it, and it waits for nobody.
One that is ours reads everyone's notes before its first collective, so that a rank without the block is an error and
not a hang."""

import time
from collections import Counter
from collections.abc import MutableMapping
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from deslo_plugin.comm.progress import another_connection
from deslo_plugin.errors import ConfigError, require

LOOK_EVERY, WAIT_S = 1.0, 1800.0  # seconds; ranks may load models at different speeds, for as long as torch would wait
OURS, OTHERS = "deslo", "no such block"

_counts: MutableMapping[dist.ProcessGroup, Counter[str]] = WeakKeyDictionary()


def leave_note(what: str, ours: bool) -> str | None:
    """Tells the other ranks whether this one's next ``what`` is ours; the place of everyone's notes, None in a world of
    one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    counts = _counts.setdefault(require(dist.group.WORLD), Counter())
    counts[what] += 1  # every rank builds them in one order
    place = f"deslo/{what}/{counts[what]}"
    store = require(dist.group.WORLD).get_group_store()
    store.set(f"{place}/{dist.get_rank()}", OURS if ours else OTHERS)
    if not ours:
        store.set(f"{place}/others", str(dist.get_rank()))
    return place


def expect_ours(what: str, place: str | None) -> None:
    """Waits for everyone's notes. Raises ``ConfigError`` on every rank that is ours, with those that are not, and with
    those that have left no note for ``WAIT_S`` seconds."""
    if place is None:
        return
    store, ranks = another_connection(require(dist.group.WORLD).get_group_store()), range(dist.get_world_size())
    notes, until = [f"{place}/{rank}" for rank in ranks], time.monotonic() + WAIT_S
    while not _there(store, notes):
        if store.check([f"{place}/others"]):
            break
        if time.monotonic() > until:
            absent = [rank for rank in ranks if not store.check([notes[rank]])]
            raise _not_everywhere(what, f"none on rank(s) {absent}, which have not come to it within {WAIT_S:g} s")
    if store.check([f"{place}/others"]):
        others = [rank for rank in ranks if store.check([notes[rank]]) and store.get(notes[rank]) == OTHERS.encode()]
        raise _not_everywhere(what, f"none on rank(s) {others}")


def _there(store: dist.Store, notes: list[str]) -> bool:
    try:
        store.wait(notes, timedelta(seconds=LOOK_EVERY))
    except dist.DistNetworkError:
        raise
    except RuntimeError:  # its time is over: stores say so in different ways
        return False
    return True


def _not_everywhere(what: str, got: str) -> ConfigError:
    return ConfigError(
        what, 'a "deslo" block or a DesLoc optimizer on every rank', got, "give every rank the same config"
    )
