"""A GPU whose streams do nothing before they must: what is queued runs when somebody waits for it, and then no more of
it than the waits ask for. A wait that is missing shows as a value that was read or overwritten too early."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deslo_plugin.comm.staging import CudaStaging

_lock = threading.RLock()


class Stream:
    def __init__(self) -> None:
        self._queue: deque[Callable[[], object]] = deque()
        self.begun, self.end = 0, 0

    def push(self, run: Callable[[], object]) -> None:
        with _lock:
            self._queue.append(run)
            self.end += 1

    def run(self, until: int) -> None:
        with _lock:
            while self.begun < until:
                self.begun += 1
                self._queue.popleft()()

    def wait_event(self, event: "Event") -> None:
        stream, mark = event.stream, event.mark
        self.push(lambda: stream.run(mark))

    def wait_stream(self, other: "Stream") -> None:
        mark = other.end
        self.push(lambda: other.run(mark))

    def synchronize(self) -> None:
        self.run(self.end)


class Event:
    def __init__(self, cuda: "FakeCuda"):
        self._cuda = cuda

    def record(self, stream: Stream) -> None:
        self.stream, self.mark = stream, stream.end

    def synchronize(self) -> None:
        assert self._cuda.device_here is not None, "this thread would make a context on the first GPU"
        self.stream.run(self.mark)


class FakeCuda:
    """What ``CudaStaging`` asks of ``torch.cuda``."""

    def __init__(self) -> None:
        self._default, self._here = Stream(), threading.local()

    def Stream(self, device: object) -> Stream:
        return Stream()

    def Event(self, blocking: bool = False) -> Event:
        return Event(self)

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self._here, "stream", self._default)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before

    def set_device(self, device: torch.device) -> None:
        self._here.device = device

    @property
    def device_here(self) -> torch.device | None:
        return getattr(self._here, "device", None)

    def synchronize(self) -> None:
        """All of this thread's stream."""
        self.current_stream().synchronize()


class FakeStaging(CudaStaging):
    """The one under test, with copies that are queued as everything else; ``allocated`` are its buffers."""

    def __init__(self, cuda: FakeCuda):
        self.allocated: list[Tensor] = []
        super().__init__(torch.device("cuda", 1), cuda)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        self._cuda.current_stream().push(lambda: to.copy_(source))

    def _pinned(self, nbytes: int) -> Tensor:
        self.allocated.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.allocated[-1]
