"""Who is late: how far each rank has come and how fast, as a note of its own in the world's store.

A note is written at every launch of an average and read by nobody until an average fails or somebody asks: nothing is
added to what travels between replicas. Writing one never waits for the store's host (a TCP store's ``set`` has no
answer), and reading waits for a moment at most.

A call that every rank must make, such as a save, begins with a roll call in the same store: who made it alone learns
that as soon as another goes on without it, not when a collective times out.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from threading import Thread
from weakref import WeakKeyDictionary

import torch.distributed as dist

from deslo_plugin.comm.rank_progress import RankProgress, describe_last, within
from deslo_plugin.comm.step_rate import StepRate, Stragglers
from deslo_plugin.comm.topology import Topology
from deslo_plugin.errors import ConfigError
from deslo_plugin.log import log_rank0

LOOK_INTERVAL_S = 0.2  # seconds between looks for stragglers, where averages follow each other faster
STORE_TIMEOUT_S = 5.0  # seconds in which those that still live answer
# seconds of a roll call: between looks at who goes on without it, and until it is said
LOOK_EVERY, PATIENCE = 1.0, 30.0


def another_connection(store: dist.Store) -> dist.Store:
    """One with the same ``store``, on which nothing of the first waits."""
    return store.clone()  # type: ignore[attr-defined]  # torch's stubs do not know it


class _Board:
    """Two connections with the store of a world, so that nobody who writes waits for an answer to somebody who
    reads."""

    def __init__(self, world: dist.ProcessGroup):
        store = world.get_group_store()
        self.write, self.read, self.attachments = another_connection(store), another_connection(store), 0


_boards: "WeakKeyDictionary[dist.ProcessGroup, _Board]" = WeakKeyDictionary()


class Progress:
    """The notes of all ranks of ``topology``, which are those of ``world``. Every rank makes its own, in the same
    order.

    Ranks of one group launch the same averages in the same order, so that the count of launches names an average.
    """

    def __init__(self, topology: Topology, world: dist.ProcessGroup):
        self.topology, self._note, self._pace, self._stragglers = (
            topology,
            RankProgress(at=time.time()),
            StepRate(),
            Stragglers(),
        )
        if world not in _boards:
            _boards[world] = _Board(world)
        self._board = _boards[world]
        self._board.attachments += 1
        self._prefix = f"deslo/{self._board.attachments}/"
        self._look, self._looked, self._seen = Thread(), -LOOK_INTERVAL_S, dict[int, RankProgress]()
        self._write(self._note)

    @property
    def launches(self) -> int:
        return self._note.launches

    def launching(self, steps: int) -> None:
        """Notes that averages are launched now, ``steps`` steps being complete."""
        moved = steps != self._note.steps
        self._pace.reached(steps)
        self._write(replace(self._note, launches=self.launches + 1, steps=steps, at=time.time(), rate=self._pace.rate))
        if moved and dist.get_rank() == 0 and time.monotonic() - self._looked > LOOK_INTERVAL_S:
            self._looked = time.monotonic()
            self._look_around(lambda notes: self._stragglers.look(self._by_replica(notes)))

    def waited(self, seconds: float) -> None:
        """These were spent on waiting for others, and are no time of this replica's steps."""
        self._pace.waited(seconds)

    def given_up(self, ranks: Iterable[int], launch: int) -> list[int]:
        """Those of ``ranks`` that were seen to have given up average number ``launch``; looks again without waiting for
        it."""
        self._look_around(self._seen.update)
        return [rank for rank in ranks if rank in self._seen and self._seen[rank].given_up >= launch]

    def late(self, ranks: Iterable[int], launch: int) -> list[str]:
        """What was seen last of those of ``ranks`` that had not come to average number ``launch``; looks again as
        ``given_up`` does."""
        self._look_around(self._seen.update)
        behind = [rank for rank in ranks if rank in self._seen and self._seen[rank].launches < launch]
        return [f"rank {rank} has not come to it ({describe_last(self._seen[rank])})" for rank in behind]

    def alone(self, ranks: Iterable[int]) -> list[int]:
        """Those of ``ranks`` that were seen to wait in a call that this rank has not come to; looks again as
        ``given_up`` does."""
        self._look_around(self._seen.update)
        return [rank for rank in ranks if rank in self._seen and self._seen[rank].changes > self._note.changes]

    def change(self, what: str, traits: str, timeout_s: float) -> None:
        """Waits until every rank has come to the same change of what is averaged. Collective, through the store.

        ``traits``: what must be alike. Raises ``ConfigError`` on every rank if they differ, or if some rank does not
        come: whoever waits for an average from here notices it, and gives up.
        """
        outer = self._note
        self._write(replace(outer, changes=outer.changes + 1, inside=what))
        try:
            self._change(what, traits, timeout_s)
        finally:
            self._write(replace(self._note, inside=outer.inside))

    def _change(self, what: str, traits: str, timeout_s: float) -> None:
        given_up = self._note.given_up
        key, store = f"{self._prefix}change {self._note.changes}", self._board.read
        mine, deadline = f"{what}: {traits}", time.monotonic() + timeout_s
        if (reference := store.compare_set(key, "", mine).decode()) != mine:
            store.set(f"{key} refused", f"{mine} on rank {self.topology.rank}")
        store.add(f"{key} came", 1)
        while store.add(f"{key} came", 0) < len(self.topology.ranks) and not store.check([f"{key} refused"]):
            notes = self._read(self.topology.ranks) or {}
            left = [rank for rank, note in notes.items() if note.given_up > max(given_up, self.launches)]
            if left or time.monotonic() > deadline:
                absent = [rank for rank, note in notes.items() if note.changes < self._note.changes]
                raise ConfigError(
                    what, "the same call on every rank", f"none on rank(s) {left or absent}", "call it on every rank"
                )
            time.sleep(0.02)
        if store.check([f"{key} refused"]):
            raise ConfigError(
                what,
                f"{reference!r} on every rank",
                repr(store.get(f"{key} refused").decode()),
                "call it alike on every rank, at the same step",
            )

    def rates(self) -> dict[int, float]:
        """Replica -> steps per second of its slowest rank between its last two averages, without what it waited for
        others.

        A replica that has not come to two averages yet is absent. Not collective. Raises ``TimeoutError`` if the
        store's host does not answer.
        """
        notes = self._read(self.topology.ranks)
        if notes is None:
            raise TimeoutError(
                f"step_rates(): expected an answer of the world's store within {STORE_TIMEOUT_S:g} s, got none; "
                "its host is gone"
            )
        return self._by_replica(notes)

    @contextmanager
    def together(self, call: str, timeout_s: float) -> Iterator[None]:
        """The body is ``call``, which every rank must make: it begins once all have come. Collective.

        Raises ``ConfigError`` for a call that other ranks cannot make any more, since they have gone on to an average
        after it or to another such call, or have not made within ``timeout_s``; nothing has been sent then, and
        training can go on."""
        outer = self._note
        self._write(replace(outer, calls=outer.calls + 1, inside=call))
        try:
            self._roll_call(call, timeout_s)
        except ConfigError:
            self._write(replace(self._note, calls=outer.calls, inside=outer.inside))
            raise
        try:
            yield
        finally:
            self._write(replace(self._note, inside=outer.inside))

    def _roll_call(self, call: str, timeout_s: float) -> None:
        key, everyone = f"{self._prefix}call/{self._note.calls}/{call}", len(self.topology.ranks)

        def come(one: int) -> int:
            count = within(STORE_TIMEOUT_S, lambda: self._board.read.add(key, one))
            return everyone if count is None else count  # without the store nobody can be asked

        start, looked, said, here = time.monotonic(), 0.0, False, come(1)
        while here < everyone:
            waited = time.monotonic() - start
            if waited - looked > LOOK_EVERY:
                looked, absent = waited, self._absent(call, waited, timeout_s)
                if absent and come(0) < everyone:
                    time.sleep(2 * LOOK_EVERY)  # others that wait in another call shall see this one
                    come(-1)
                    raise ConfigError(
                        call,
                        "a call on every rank",
                        absent,
                        "move it out of `if rank == 0:` and the like: it is collective, and only what writes its "
                        "result belongs there",
                    )
                if waited > PATIENCE and not said:
                    said = True
                    log_rank0(
                        f"deslo: rank {self.topology.rank} has waited {PATIENCE:g} s in {call} for others to call it "
                        "too: every rank must, so not inside `if rank == 0:`",
                        logging.WARNING,
                        anywhere=True,
                    )
            time.sleep(min(0.001 + waited / 32, 0.1))
            here = come(0)

    def _absent(self, call: str, waited: float, timeout_s: float) -> str:
        """Which ranks will not come to ``call`` any more, and what they do instead; "" if all may."""
        own, notes = self._note, self._read(self.topology.ranks) or {}
        for rank, note in notes.items():
            # in another call, or before a change that it cannot make without this rank
            elsewhere = note.calls == own.calls or note.calls < own.calls and note.changes > own.changes
            if elsewhere and note.inside not in ("", call):
                return f"{note.inside} on rank {rank}"
        behind = {rank: note for rank, note in notes.items() if note.calls < own.calls}
        gone = [rank for rank in behind if rank in self.topology.replica_group and behind[rank].launches > own.launches]
        if gone:  # ranks of one group launch in one order
            return f"none on rank(s) {gone}, which went on to the average after step {behind[gone[0]].steps}"
        return f"none on rank(s) {list(behind)} for {timeout_s:g} s" if behind and waited > timeout_s else ""

    def missing(self, ranks: Iterable[int], launch: int, *, timed_out: bool) -> str:
        """A sentence on which of ``ranks`` an average that has failed is missing, ``launch`` being its number.

        Waits a moment for the others to give up as well: who then has not said so is silent.
        """
        others = [rank for rank in ranks if rank != self.topology.rank]
        deadline, known = time.monotonic() + STORE_TIMEOUT_S, None
        behind, silent = list[int](), list[int]()
        while (notes := self._read(others)) is not None:
            known = notes
            if self._note.given_up < launch:
                self._write(replace(self._note, given_up=launch))
            behind = [rank for rank in others if known[rank].launches < launch]
            silent = [rank for rank in others if known[rank].launches >= launch > known[rank].given_up]
            if time.monotonic() > deadline or (not silent and (timed_out or not behind)):
                break
            time.sleep(0.05)
        if known is None:
            return (
                f"the store that knows who is late gave no answer in {STORE_TIMEOUT_S:g} s: its host, rank 0 or the "
                "launcher's first node, may be what died"
            )
        told = [f"rank {rank} has not come to it ({describe_last(known[rank])})" for rank in behind]
        told += [f"rank {rank} came to it and has said nothing since ({describe_last(known[rank])})" for rank in silent]
        return ", ".join(told) or "every rank came to it and lives: the link between them is broken or too slow"

    def _by_replica(self, notes: dict[int, RankProgress]) -> dict[int, float]:
        rates = {
            replica: [rate for rank in row if (rate := notes[rank].rate) is not None]
            for replica, row in enumerate(self.topology.ranks_by_replica)
        }
        return {replica: min(known) for replica, known in rates.items() if len(known) == self.topology.replica_size}

    def _look_around(self, then: Callable[[dict[int, RankProgress]], object]) -> None:
        """``then(notes)`` soon, unless a look is under way: the store may be far, and training goes on."""

        def look() -> None:
            if notes := self._read(self.topology.ranks):
                then(notes)

        if not self._look.is_alive():
            self._look = Thread(target=look, daemon=True)
            self._look.start()

    def _write(self, note: RankProgress) -> None:
        self._note = note
        try:
            self._board.write.set(f"{self._prefix}{self.topology.rank}", json.dumps(asdict(note)))
        except RuntimeError:
            pass  # the store's host is gone: training needs it no more, and ``missing`` says so if an average fails

    def _read(self, ranks: Iterable[int]) -> dict[int, RankProgress] | None:
        ranks = list(ranks)

        def read() -> dict[int, RankProgress]:
            texts = self._board.read.multi_get([f"{self._prefix}{rank}" for rank in ranks])
            return {rank: RankProgress(**json.loads(text)) for rank, text in zip(ranks, texts)}

        return within(STORE_TIMEOUT_S, read)
