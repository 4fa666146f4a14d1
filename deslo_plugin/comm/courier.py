"""A thread that starts collectives over gloo in one order: those of averages that cannot be started and left alone.

Averages through host memory wait for copies first (``deslo.transport: "host"``), and quantised ones for their first
half. There is one courier for each set of ranks, and it serves averages in the order in which they were handed to it:
the order is the same on every rank, whatever the devices do, also where several optimizers average between the same
ranks.
"""

import atexit
import hashlib
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm.progress import another_connection
from deslo_plugin.comm.quantized import QuantizedBucket
from deslo_plugin.comm.staging import Staged, Staging, staging_of
from deslo_plugin.errors import ConfigError

EXIT_S = 2.0  # that the end of the process leaves a courier, so that it is not cut off inside a call


class Parcel:
    """A chunk on its way: what ``dist.Work`` is for an all-reduce in place."""

    def __init__(self, staging: Staging, chunk: Tensor):
        self._staging, self._chunk = staging, chunk
        self._staged: Staged = staging.to_host(chunk)
        self._handed_over = Event()
        self._work: Any = None
        self._error: Exception | None = None
        self._landed = False

    def hand_over(self, gloo: Any) -> None:
        """The courier's part: starts the all-reduce once the chunk is in host memory. ``wait`` raises its errors."""
        try:
            self._staging.wait(self._staged)
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.AVG  # type: ignore[assignment]  # torch takes either
            self._work = gloo.allreduce([self._staged.buffer.view(self._chunk.dtype)], options)
        except Exception as error:
            self._error = error
        self._handed_over.set()

    def is_completed(self) -> bool:
        return self._handed_over.is_set() and (self._error is not None or self._work.is_completed())

    def wait(self) -> None:
        """The mean is in the chunk for all that is queued on the current stream from now on.

        The buffer of an average that failed is not used again: gloo may still write into it.
        """
        if self._landed:  # its buffer carries others by now
            return
        self._handed_over.wait()
        if self._error is not None:
            raise self._error
        self._work.wait()
        self._staging.to_device(self._staged, self._chunk)
        self._landed = True


class QuantizedParcel:
    """A quantised average on its way: what ``dist.Work`` is for both of its halves."""

    def __init__(self, staging: Staging, bucket: QuantizedBucket):
        self._staging, self._bucket = staging, bucket
        self._sent, self._own = staging.to_host(bucket.mine.view(-1)), staging.to_host(bucket.rest.view(-1))
        self._done = Event()
        self._error: Exception | None = None
        self._landed = False

    def hand_over(self, gloo: Any) -> None:
        """The courier's part: both halves, and the mean between them. ``wait`` raises its errors."""
        try:
            self._staging.wait(self._sent)
            self._staging.wait(self._own)
            sent = self._sent.buffer.view(self._bucket.mine.shape)
            own = self._own.buffer.view(torch.float32).view(self._bucket.rest.shape)
            received, weights = torch.empty_like(sent), self._bucket.weights
            gloo.alltoall_base(received, sent, [], []).wait()
            if self._bucket.weight is not None:
                gloo.allgather([list(weights.chunk(len(weights)))], [torch.tensor([self._bucket.weight])]).wait()
            codes = self._bucket.mean(received, own)
            gloo.allgather([list(sent)], [codes]).wait()
        except Exception as error:
            self._error = error
        self._done.set()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """What was gathered is in the bucket for all that is queued on the current stream from now on."""
        if self._landed:
            return
        self._done.wait()
        if self._error is not None:
            raise self._error
        self._staging.to_device(self._sent, self._bucket.gathered[self._bucket.copy].view(-1))
        self._staging.to_device(self._own, self._bucket.rest.view(-1))
        self._landed = True


class Courier:
    """Starts the collectives between ``ranks``, in one order, from a thread of its own.

    Its gloo is no process group of torch's list: only ``ranks`` make it, and NCCL, from which torch splits every group
    of a world with a bound device, has no part in it. It lives as long as the process, as it does not stand being taken
    apart while an average hangs."""

    def __init__(self, store: dist.Store, ranks: Sequence[int], timeout_s: float, beside: str, key: str):
        name = hashlib.sha256(repr((ranks, timeout_s, beside)).encode()).hexdigest()
        try:
            gloo = dist.ProcessGroupGloo(
                dist.PrefixStore(f"deslo/host/{name}/", store),
                ranks.index(dist.get_rank()),
                len(ranks),
                timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:
            raise ConfigError(
                key,
                f"gloo to connect ranks {ranks}",
                repr(str(error).splitlines()[0]),
                "set GLOO_SOCKET_IFNAME to the interface of the link between replicas, or remove the key",
            ) from error
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._gloo, self._stagings = gloo, dict[torch.device, Staging]()
        self._thread = Thread(target=_serve, args=(self._queue, gloo), daemon=True, name="deslo courier")
        self._thread.start()
        _couriers.add(self)

    def send(self, chunk: Tensor) -> Parcel:
        """Starts the mean of ``chunk``."""
        parcel = Parcel(self.staging(chunk.device), chunk)
        self._queue.put(partial(parcel.hand_over, self._gloo))
        return parcel

    def send_quantized(self, bucket: QuantizedBucket) -> QuantizedParcel:
        """Starts the mean of what ``bucket`` holds."""
        parcel = QuantizedParcel(self.staging(bucket.mine.device), bucket)
        self._queue.put(partial(parcel.hand_over, self._gloo))
        return parcel

    def staging(self, device: torch.device) -> Staging:
        """The one of ``device``, whose buffers all averages between these ranks share."""
        if device not in self._stagings:
            self._stagings[device] = staging_of(device)
        return self._stagings[device]

    def drain(self, seconds: float) -> None:
        """Waits, for so long at most, until all that was sent is handed over. In a forked process there is nothing."""
        if self._thread.is_alive():
            done = Event()
            self._queue.put(done.set)
            done.wait(seconds)


def _serve(queue: "SimpleQueue[Any]", gloo: Any) -> None:
    while True:  # and holds gloo for ever
        queue.get()()


_couriers: WeakSet[Courier] = WeakSet()
_made: "WeakKeyDictionary[dist.ProcessGroup, dict[dist.ProcessGroup, Courier]]" = WeakKeyDictionary()


@atexit.register
def _let_finish() -> None:
    for courier in list(_couriers):
        courier.drain(EXIT_S)


def courier_between(
    replica: dist.ProcessGroup, world: dist.ProcessGroup, timeout_s: float, key: str = 'deslo.transport "host"'
) -> Courier:
    """That of the ranks of ``replica``, created once for it in a ``world`` they are part of. Collective over them.

    ``key``: of the config, that wants it. Raises ``ConfigError`` about it where gloo does not connect them."""
    made = _made.setdefault(world, {})
    if replica not in made:
        ranks = tuple(dist.get_process_group_ranks(replica))
        made[replica] = Courier(another_connection(world.get_group_store()), ranks, timeout_s, replica.group_name, key)
    return made[replica]
