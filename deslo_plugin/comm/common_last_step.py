"""Ranks that are at different steps agree, through a store, on the last one: none stops while another waits for it."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist


class LastStep:
    """What one rank knows of it. ``ask`` on any rank; from then on every rank calls ``after`` when a step has ended.

    A rank announces every step before it takes it. Once all have announced one, the first rank closes the list and then
    reads it: whoever announces later finds it closed, waits, and takes no step beyond the highest one that was read.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: Sequence[int], timeout_s: float):
        self._store, self._own, self._first = store, f"rank {rank}", rank == ranks[0]
        self._announced, self._timeout = [f"rank {each}" for each in ranks], timedelta(seconds=timeout_s)

    def request_stop(self) -> None:
        self._store.set("asked", "1")

    def stop_requested(self) -> bool:
        return self._store.check(["asked"])

    def is_last_step(self, steps: int) -> bool:
        """Whether step number ``steps``, which has just ended, is the last one of all ranks."""
        self._store.set(self._own, str(steps + 1))
        if self._first and not self._store.check(["closed"]) and self._store.check(self._announced):
            self._store.set("closed", "1")
            self._store.set("last", str(max(int(self._store.get(key)) for key in self._announced)))
        if not self._store.check(["closed"]):
            return False  # others may be waiting for the next step
        self._store.wait(["last"], self._timeout)
        return steps >= int(self._store.get("last"))
