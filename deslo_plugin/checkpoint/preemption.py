"""A job that is told to go ends after the same step on every rank, with nothing lost."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deslo_plugin.attachment import attachments_of
from deslo_plugin.checkpoint.pending_save import finish_pending_save
from deslo_plugin.checkpoint.save_load import save
from deslo_plugin.comm.common_last_step import LastStep
from deslo_plugin.comm.progress import another_connection
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.log import log_rank0
from deslo_plugin.renamed import Renamed

POLL_S = 1.0
_number = count()  # of this world's preemptions, built in the same order on every rank


class Preemption:
    """Watches for ``signals``; ``should_stop`` tells every rank after which step to save and leave.

        preemption = deslo_plugin.Preemption(model)
        for step, batch in enumerate(batches):
            ...
            optimizer.step()
            if preemption.should_stop():
                preemption.save_and_exit("checkpoints/last", extra={"step": step + 1})

    One rank that gets a signal is enough: it says so in the rendezvous store, where every rank looks once a second, in
    a thread and over a connection of its own. No step asks the store anything before that.

    Args:
        model: an attached model, or an engine.
        signals: what asks for the end, by default SIGTERM. They have their old effect again once ``exit`` has begun.
    """

    due, exit = Renamed("should_stop"), Renamed("save_and_exit")

    def __init__(self, model: Any, signals: Sequence[signal.Signals] = (signal.SIGTERM,)):
        self.model, self._attachments, self._last = model, attachments_of(model, "Preemption"), None
        self._asked, self._over = threading.Event(), threading.Event()
        if dist.is_initialized():
            topology, timeout = self._attachments[0].topology, self._attachments[0].config.deslo.timeout_s
            store = dist.PrefixStore(f"deslo/stop/{next(_number)}", require(dist.group.WORLD).get_group_store())
            self._last, watched = (
                LastStep(each, topology.rank, sorted(topology.ranks), timeout)
                for each in (store, another_connection(store))
            )
            threading.Thread(target=self._watch, args=(watched,), daemon=True).start()
        self._before = {number: signal.signal(number, lambda *_: self._asked.set()) for number in signals}

    def should_stop(self) -> bool:
        """Whether the step that has just ended is the last. Call it on every rank after every step."""
        return self._asked.is_set() and (self._last is None or self._last.is_last_step(self._steps))

    def save_and_exit(
        self,
        path: str | Path,
        *,
        mode: str | None = None,
        extra: Mapping[str, Any] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        """Waits for averages in flight, saves as ``deslo_plugin.save`` does, and ends the process with status 0.

        The process ends at once, without ``atexit`` and ``finally``. ``before`` is called when all is saved, on every
        rank: to close what the script itself writes to, such as trackers (``accelerator.end_training``,
        ``wandb.finish``). What it raises is said, and the job ends all the same. Raises what ``save`` raises, on every
        rank, and goes on then."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._over.set()
        self._finish_pending_save()
        save(path, self.model, mode=mode, extra=extra)
        for each in self._attachments:
            each.averaging.abandon()
            each.close()
        try:
            if before is not None:
                before()
        except Exception as error:
            log_rank0(
                f"deslo: Preemption.save_and_exit(before=...) failed, the checkpoint is whole: {error!r}",
                logging.WARNING,
                anywhere=True,
            )
        log_rank0(f"deslo: saved {path} after step {self._steps}, leaving")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        if dist.is_initialized():
            dist.barrier()
        os._exit(0)  # what would follow is the end of the backends' threads, which aborts now and then

    def _finish_pending_save(self) -> None:
        """An older save that failed in the background is said, and does not stop the last one."""
        attachment = self._attachments[0]
        try:
            finish_pending_save(attachment.topology, attachment.groups.world)
        except (ConfigError, OSError) as error:
            log_rank0(f"deslo: a save before this one had failed: {error}", logging.WARNING)

    @property
    def _steps(self) -> int:
        return self._attachments[0].averaging.steps

    def _watch(self, last: LastStep) -> None:
        while not self._over.is_set():
            try:
                if self._asked.is_set():
                    return last.request_stop()
                if last.stop_requested():
                    return self._asked.set()
            except dist.DistError:
                return  # the store ends with the job
            self._over.wait(POLL_S)
