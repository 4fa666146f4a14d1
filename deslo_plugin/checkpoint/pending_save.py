"""A save whose files are written in the background, and what must wait for it: the next save or load, and the end."""

import concurrent.futures.thread  # noqa: F401  registers the end of its pools, before ours
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.comm.topology import Topology
from deslo_plugin.log import log_rank0


class PendingSave:
    """What ``deslo_plugin.save(..., wait=False)`` returns. Every rank has one of its own."""

    def __init__(self, path: Path, write: Callable[[], object], *, speaks: bool):
        self.path, self._write, self._speaks = path, write, speaks
        self._error: BaseException | None = None
        self._told = False
        # no daemon: the interpreter waits for it before it ends
        self._thread = threading.Thread(target=self._run, name=f"deslo save {path}")
        self._thread.start()

    def done(self) -> bool:
        """Whether the checkpoint is in its place, or has failed. Not collective: ranks may differ for a moment."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the checkpoint is in its place on every rank.

        Sends nothing: any rank may call it, at any time, again and again. Raises what ``save`` raises for files,
        ``OSError`` with the rank that failed, on every rank that calls it; the checkpoint before is untouched then.
        """
        self._thread.join()
        if self._error is not None:
            self._told = True
            raise self._error

    def _untold(self) -> str | None:
        """The error, if nobody has asked for it; waits for the end."""
        self._thread.join()
        return None if self._error is None or self._told else str(self._error)

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._write()
        except BaseException as error:
            self._error = error
            if self._speaks:
                log_rank0(
                    f"deslo: the save of {self.path} in the background failed, what was there before stays; the next "
                    f"save, load or wait() raises it: {error}",
                    logging.ERROR,
                    anywhere=True,
                )


_pending: dict[tuple[int, ...], PendingSave] = {}
"""By the ranks that save together, at most one each."""


def save_in_background(topology: Topology, path: Path, write: Callable[[], object]) -> PendingSave:
    """Begins ``write()``, which all ranks of ``topology`` do together, in a thread."""
    _wait_before_groups_are_destroyed()
    _wait_before_the_process_ends()
    ranks = tuple(sorted(topology.ranks))
    _pending[ranks] = PendingSave(path, write, speaks=topology.rank == ranks[0])
    return _pending[ranks]


def finish_pending_save(topology: Topology, world: dist.ProcessGroup | None) -> None:
    """Waits for the save in the background, if there is one, and raises its error on every rank if any rank has not
    raised it yet. Collective over ``world``, the ranks of ``topology``."""
    pending = _pending.pop(tuple(sorted(topology.ranks)), None)
    if pending is None:
        return
    untold = pending._untold()
    everyone: dict[int, Any] = all_gather_by_rank(untold, world) if world is not None else {0: untold}
    if any(everyone.values()):
        pending.wait()
        rank, error = next((rank, error) for rank, error in everyone.items() if error)
        raise OSError(f"checkpoint: {pending.path}: rank {rank} failed: {error}")


@functools.cache
def _wait_before_groups_are_destroyed() -> None:
    """The thread sends over process groups: their end waits for it, as the end of the process does."""
    destroy = distributed_c10d.destroy_process_group

    @functools.wraps(destroy)
    def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
        if group not in (None, dist.group.WORLD):
            return destroy(group)
        untold = [pending for pending in _pending.values() if pending._untold()]
        _pending.clear()
        destroy(group)
        for pending in untold:
            pending.wait()

    dist.destroy_process_group = distributed_c10d.destroy_process_group = destroy_process_group


@functools.cache
def _wait_before_the_process_ends() -> None:
    """The interpreter waits for the thread, but takes new work for no pool of threads any more by then, and a store's
    package looks up names of hosts in one. What is registered here comes before those pools end."""
    cast(Any, threading)._register_atexit(_join)


def _join() -> None:
    for pending in _pending.values():
        pending._thread.join()
