"""Host memory that averages travel through: a chunk is copied out of its device, and its mean back into it.

The copies are ordered by streams and events. The thread that trains waits for none of them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from deslo_plugin.errors import ConfigError


@dataclass(frozen=True)
class Staged:
    """A chunk in host memory: ``buffer`` holds it once ``arrived`` has come, an event of the device (None: at once)."""

    buffer: Tensor
    arrived: Any = None


class Staging(Protocol):
    """The way between one device and host memory."""

    def to_host(self, chunk: Tensor) -> Staged:
        """Starts to copy ``chunk`` as the current stream leaves it. The caller keeps it alive and unchanged until
        ``wait`` has returned."""

    def wait(self, staged: Staged) -> None:
        """Blocks until the copy is complete. May run in any thread."""

    def to_device(self, staged: Staged, chunk: Tensor) -> None:
        """Starts to copy the buffer into ``chunk``, on the current stream, and gives the buffer up."""


class HostBuffers:
    """Buffers of bytes that are used again. They never hold more than was in use at one moment."""

    def __init__(self, allocate: Callable[[int], Tensor]):
        self._allocate, self._lock = allocate, Lock()
        self._free: deque[tuple[Tensor, Any]] = deque()  # the oldest first, each with the event of its last reader
        self.used = self.idle = self.peak = 0  # bytes: in use, free, and the most that was in use

    def take(self, nbytes: int) -> tuple[Tensor, Any]:
        """A buffer of ``nbytes``, and the event after which it may be written (None: at once)."""
        with self._lock:
            self.used += nbytes
            self.peak = max(self.peak, self.used)
            for index, (buffer, _) in enumerate(self._free):
                if buffer.nbytes == nbytes:
                    found = self._free[index]
                    del self._free[index]
                    self.idle -= nbytes
                    return found
            self._trim()
        return self._allocate(nbytes), None

    def give_back(self, buffer: Tensor, last_read: Any = None) -> None:
        """``buffer`` may be written again once ``last_read`` has come."""
        with self._lock:
            self.used -= buffer.nbytes
            self.idle += buffer.nbytes
            self._free.append((buffer, last_read))
            self._trim()

    def _trim(self) -> None:
        while self.used + self.idle > self.peak:
            self.idle -= self._free.popleft()[0].nbytes


class CopyStaging:
    """For chunks that are in host memory already: plain copies."""

    def __init__(self) -> None:
        self.buffers = HostBuffers(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))

    def to_host(self, chunk: Tensor) -> Staged:
        buffer, _ = self.buffers.take(chunk.nbytes)
        buffer.view(chunk.dtype).copy_(chunk)
        return Staged(buffer)

    def wait(self, staged: Staged) -> None:
        pass

    def to_device(self, staged: Staged, chunk: Tensor) -> None:
        chunk.copy_(staged.buffer.view(chunk.dtype))
        self.buffers.give_back(staged.buffer)


class CudaStaging:
    """Of one GPU, in pinned memory, with a stream of its own for copies to the host: they run beside what trains.

    ``cuda`` is ``torch.cuda``, or what a test puts in its place.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self.device, self._cuda = device, cuda
        self._out = cuda.Stream(device=device)
        self.buffers = HostBuffers(self._pinned)

    def to_host(self, chunk: Tensor) -> Staged:
        buffer, last_read = self.buffers.take(chunk.nbytes)
        self._out.wait_stream(self._cuda.current_stream(self.device))  # what packs the chunk
        if last_read is not None:
            # the copy of the buffer's last mean to the device, perhaps on a stream that is not current now
            self._out.wait_event(last_read)
        with self._cuda.stream(self._out):
            self._copy(buffer.view(chunk.dtype), chunk)
        # no record_stream: who holds the chunk until ``wait`` has returned frees it after the copy, for any stream
        arrived = self._cuda.Event(blocking=True)  # whoever waits sleeps, and takes no core from the training
        arrived.record(self._out)
        return Staged(buffer, arrived)

    def wait(self, staged: Staged) -> None:
        # a new thread's device is 0: without this each rank would make a context on the first GPU of its node
        self._cuda.set_device(self.device)
        staged.arrived.synchronize()

    def to_device(self, staged: Staged, chunk: Tensor) -> None:
        stream = self._cuda.current_stream(self.device)
        with self._cuda.stream(stream):
            self._copy(chunk, staged.buffer.view(chunk.dtype))
        read = self._cuda.Event()
        read.record(stream)
        self.buffers.give_back(staged.buffer, read)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def _pinned(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise ConfigError(
                "deslo.transport",
                f"{nbytes:,} bytes more of pinned host memory for averages ({self.buffers.peak:,} in all)",
                repr(str(error).splitlines()[0]),
                'free host memory, raise the limit on locked memory (ulimit -l), or set it to "device"',
            ) from error


def staging_of(device: torch.device) -> Staging:
    """The way between ``device`` and host memory."""
    return CudaStaging(device) if device.type == "cuda" else CopyStaging()
