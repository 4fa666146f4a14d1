"""Who waits for a whole device while an average travels, and who is late, on every rank of a ``Processes`` world."""

import contextlib
import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.support import jobs, torch_jobs


class Stream:
    """One of a device that computes at once."""

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    wait_stream = wait_event = record_event = record = synchronize = wait


@contextlib.contextmanager
def device_that_waits() -> Iterator[SimpleNamespace]:
    """DeepSpeed believes in streams; ``waits`` are the places where it waited for the device, and how many averages
    flew then."""
    import traceback

    from deepspeed.accelerator import get_accelerator

    from deslo_plugin.comm import replica_transport as transport

    seen = SimpleNamespace(air=0, waits=[], launched=0)
    start, wait = transport.ReplicaTransport.start, transport._Pending.wait

    def starts(self: Any, chunk: torch.Tensor) -> Any:
        seen.air += 1
        seen.launched += 1
        return start(self, chunk)

    def waits(self: Any) -> None:
        wait(self)
        seen.air -= 1

    def synchronize(self: Any, *_: Any) -> None:
        frame = traceback.extract_stack(limit=2)[0]
        seen.waits.append((f"{frame.filename.rpartition('/')[2]}:{frame.name}", seen.air))

    kind = type(get_accelerator())
    with (
        mock.patch.object(transport.ReplicaTransport, "start", starts),
        mock.patch.object(transport._Pending, "wait", waits),
        mock.patch.object(kind, "resolves_data_dependency", lambda self: False),
        mock.patch.object(kind, "is_synchronized_device", lambda self: False),
        mock.patch.object(kind, "synchronize", synchronize),
        mock.patch.object(kind, "Stream", Stream),
        mock.patch.object(kind, "Event", Stream),
        mock.patch.object(kind, "stream", lambda self, stream: contextlib.nullcontext()),
        mock.patch.object(kind, "current_stream", lambda self, index=None: Stream()),
        mock.patch.object(kind, "default_stream", lambda self, index=None: Stream()),
        mock.patch.object(torch.Tensor, "record_stream", lambda self, stream: None),
    ):
        yield seen


def waits_of_an_engine(ds: dict, steps: int, stock: bool) -> dict:
    """Where an engine waits for the device while averages fly; and what it says of that."""
    import deepspeed  # noqa: F401  (before what hooks into it)

    from deslo_plugin.frameworks.deepspeed import synchronisation

    said: list[str] = []
    with (
        device_that_waits() as seen,
        mock.patch.object(synchronisation, "log_rank0", lambda message, *_: said.append(message)),
        jobs.stock_engine(ds) if stock else jobs.engine_for(ds) as engine,
    ):
        jobs.train(engine, range(steps))
        return {
            "in the air": [place for place, air in seen.waits if air],
            "waits": len(seen.waits),
            "launched": seen.launched,
            "synchronized": engine.tput_timer.config.synchronized,
            "said": said,
        }


def plain_engine_beside(ds: dict) -> tuple[bool, bool]:
    """Whether the timers of (ours, another engine of the process) wait for the device."""
    foreign = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    with device_that_waits(), jobs.engine_for(ds) as ours, jobs.engine_for(foreign) as other:
        return ours.tput_timer.config.synchronized, other.tput_timer.config.synchronized


def late_rank(blocks: dict, late: int, at: int, steps: int, seconds: float) -> tuple[list[str], dict]:
    """Trains; rank ``late`` pauses before step ``at``. What this rank said meanwhile, and its states."""
    from deslo_plugin.comm import replica_transport as transport

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("deslo_plugin")
    patience = mock.patch.object(transport, "SAY_AFTER_S", 1.0)
    often = mock.patch.object(transport, "PEER_CHECK_INTERVAL_S", 0.2)
    with patience, often:
        model, optimizer, _ = torch_jobs.attached("plain", blocks)
        logger.setLevel(logging.WARNING)
        logger.addHandler(handler)
        try:
            for step in range(steps):
                if (dist.get_rank(), step) == (late, at):
                    time.sleep(seconds)
                torch_jobs.train(model, optimizer, range(step, step + 1))
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.ERROR)
    return said, torch_jobs.states_of(model, optimizer, [])
