"""Worlds of replicas for tests: threads with a barrier average, and real gloo processes.

``threads`` runs a function once per replica in one process, in milliseconds. ``Processes`` keeps a pool of real ranks
joined by gloo (rendezvous through a file, no ports) and runs module-level functions on all of them.
"""

import gc
import os
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.comm.quantized import QuantizedBucket
from deslo_plugin.comm.transport import FixedMembership
from tests.support import device

MANY_THREADS = 60
PLENTY_S = 900  # against hangs, on a machine that is ten times as busy
STARTED = torch.multiprocessing.get_context("forkserver" if device.ON_CPU else "spawn")
"""How tests start processes: forked off one that has imported all, which a process that uses a GPU must not be."""
STARTED.set_forkserver_preload(["tests.support.preloaded"])


class ThreadAverage(FixedMembership):
    """The ``Transport`` of one replica of ``world``: means by barrier, over the replicas' threads."""

    divisor, progress = 1, None

    def __init__(self, world: "ThreadWorld", rank: int):
        self.world, self.rank, self.replicas = world, rank, world.replicas
        self.sent: list[int] = []

    def start_quantized(self, values, bases, errors, format, weight):
        place = {"copies": 1, "copy": 0, "replicas": self.replicas, "replica": self.rank}
        bucket = QuantizedBucket(values, bases, errors, format, weight, **place)
        self.sent.append(bucket.nbytes)
        return bucket, self._Exchange(self, bucket)

    class _Exchange:
        def __init__(self, average: "ThreadAverage", bucket: QuantizedBucket):
            self.average, self.bucket = average, bucket

        def wait(self) -> None:
            exchange, bucket = self.average.world.exchange, self.bucket
            sent = exchange(self.average.rank, (bucket.mine.clone(), bucket.weight))
            if bucket.weight is not None:
                bucket.weights = torch.tensor([weight for _, weight in sent])
            codes = bucket.mean(torch.stack([each[self.average.rank] for each, _ in sent]), bucket.rest)
            bucket.gathered[0] = torch.stack(exchange(self.average.rank, codes))

    def start(self, chunk: Tensor) -> "ThreadAverage._Work":
        self.sent.append(chunk.nbytes)
        return self._Work(self, chunk)

    class _Work:
        def __init__(self, average: "ThreadAverage", chunk: Tensor):
            self.average, self.chunk = average, chunk

        def wait(self) -> None:
            everyone = self.average.world.exchange(self.average.rank, self.chunk.clone())
            self.chunk.copy_(torch.stack(everyone).mean(0))

    def any(self, flag: bool) -> bool:
        return flag

    def total(self, value: float) -> float:
        return value

    def culprits(self, flag: bool) -> list[int]:
        return [rank for rank, bad in enumerate(self.world.exchange(self.rank, flag)) if bad]


class ThreadWorld:
    def __init__(self, replicas: int):
        self.replicas, self._slots = replicas, [None] * replicas
        self._barrier = threading.Barrier(replicas, timeout=PLENTY_S)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Everyone's value, in rank order."""
        self._slots[rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values


def threads(replicas: int, run: Callable[[ThreadAverage], Any]) -> list[Any]:
    """``run(average)`` on every replica; results in rank order. Re-raises the first replica's exception."""
    world, results = ThreadWorld(replicas), [None] * replicas

    def one(rank: int) -> None:
        try:
            results[rank] = (run(ThreadAverage(world, rank)), None)
        except BaseException as error:
            results[rank] = (None, error)
            world._barrier.abort()

    workers = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(replicas)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=PLENTY_S)
    errors = [error for _, error in results if error is not None]
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in real or errors:
        raise error
    return [result for result, _ in results]


BROKEN = (
    "no answer within",
    "the process died",
    "Connection closed by peer",
    "Application timeout caused pair closure",
    "Connection reset by peer",
)
"""What errors say of a world whose ranks cannot reach each other any more."""


class RankError(AssertionError):
    """A function failed on some rank of a ``Processes`` world. ``errors`` holds the traceback of each rank or None."""

    def __init__(self, errors: list[str | None]):
        super().__init__("\n".join(f"[rank {rank}] {error}" for rank, error in enumerate(errors) if error))
        self.errors = errors


class Processes:
    """``size`` real processes, one torch thread each, joined by gloo through a file or ``rendezvous``; killed when
    closed or when a call times out."""

    def __init__(self, size: int, folder: Path, rendezvous: str | None = None):
        self.size, rendezvous = size, rendezvous or f"file://{folder / 'rendezvous'}"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = STARTED.Pipe()
            process = STARTED.Process(target=_serve, args=(rank, size, rendezvous, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    @property
    def crowded(self) -> bool:
        """Whether a rank holds more groups than tests should leave behind: gloo keeps three threads for each, of which
        one wakes a hundred times a second, so that a hundred groups keep a core busy."""
        return any(len(os.listdir(f"/proc/{each.pid}/task")) > MANY_THREADS for each in self._processes)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = PLENTY_S) -> list[Any]:
        """``function(*args)`` on every rank; results in rank order. Raises ``RankError`` with every traceback."""
        results, errors = self._answers(function, args, timeout)
        if any(errors):
            raise RankError(errors)
        return results

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float = PLENTY_S) -> list[Any]:
        """As ``run``, but a rank that dies or raises gives its error as its result."""
        results, errors = self._answers(function, args, timeout)
        return [error or result for result, error in zip(results, errors)]

    def _answers(self, function: Callable[..., Any], args: tuple, timeout: float) -> tuple[list, list[str | None]]:
        for pipe in self._pipes:
            pipe.send((function, args))
        results, errors = [None] * self.size, [None] * self.size
        deadline = time.monotonic() + timeout
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(1.0, deadline - time.monotonic())):
                errors[rank] = f"no answer within {timeout} s"
                continue
            try:
                results[rank], errors[rank] = pipe.recv()
            except (EOFError, ConnectionResetError):
                errors[rank] = "the process died"
        if any(error and any(sign in error for sign in BROKEN) for error in errors):
            self.close()  # whatever ran on it next would fail too
        return results, errors

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(timeout=10)


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection) -> None:
    gc.freeze()  # what is imported stays: DeepSpeed's engines collect all the rest several times each
    # else a loader's workers would come from a server of this rank's own, which imports all once more
    torch.multiprocessing.set_start_method("fork" if device.ON_CPU else "spawn", force=True)
    torch.set_num_threads(1)
    device.install()
    local = rank if device.ON_CPU else 0  # frameworks take it for the index of a GPU, and all share one
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"DS_ACCELERATOR": device.ACCELERATOR, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["LOCAL_SIZE"] = "1"  # DeepSpeed's name for the count of CPUs, which it asks of numactl at every step
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=timedelta(seconds=PLENTY_S)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((device.on_cpu(function(*args)), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
