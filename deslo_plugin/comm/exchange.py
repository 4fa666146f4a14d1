"""Both halves of a quantised average, started and left alone: on streams of the device, or by a courier."""

from functools import cache

import torch
import torch.distributed as dist

from deslo_plugin.comm.courier import QuantizedParcel, courier_between
from deslo_plugin.comm.process_groups import uses_nccl
from deslo_plugin.comm.quantized import QuantizedBucket

KEY = "deslo.wire_dtype"


class StreamExchange:
    """Over NCCL, on a stream of its own: the host queues everything and waits for nothing."""

    def __init__(self, bucket: QuantizedBucket, group: dist.ProcessGroup):
        device = bucket.mine.device
        stream = _stream_of(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # what has quantised
        with torch.cuda.stream(stream):
            # kept until all of it is done: NCCL reads and writes them on streams of its own
            self._received = torch.empty_like(bucket.mine)
            dist.all_to_all_single(self._received, bucket.mine, group=group)
            if bucket.weight is not None:
                weight = torch.full((1,), bucket.weight, device=device)
                bucket.weights = torch.empty(len(bucket.weights), device=device)
                dist.all_gather_into_tensor(bucket.weights, weight, group=group)
            self._codes = bucket.mean(self._received, bucket.rest)
            gathered = bucket.gathered[bucket.copy]
            self._work = dist.all_gather_into_tensor(gathered.flatten(0, 1), self._codes, group=group, async_op=True)
            self._work.wait()  # the stream's part: the event below is after the second half
            self._done = torch.cuda.Event()
            self._done.record(stream)

    def is_completed(self) -> bool:
        return self._done.query()

    def wait(self) -> None:
        self._done.wait()
        self._work.wait()


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device=device)


def open_exchange(group: dist.ProcessGroup, world: dist.ProcessGroup, timeout_s: float, device: torch.device) -> None:
    """Makes the connections of ``exchange`` of tensors on ``device``. Collective over ``group``. Raises ``ConfigError``
    where ranks do not reach each other."""
    if device.type == "cuda" and uses_nccl(group):
        sent = torch.zeros(group.size(), dtype=torch.uint8, device=device)
        dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
        torch.cuda.current_stream(device).synchronize()
    else:
        courier_between(group, world, timeout_s, KEY)


def exchange(
    bucket: QuantizedBucket, group: dist.ProcessGroup, world: dist.ProcessGroup, timeout_s: float
) -> StreamExchange | QuantizedParcel:
    """Starts the mean of ``bucket`` over ``group``. Collective over it."""
    if bucket.mine.is_cuda and uses_nccl(group):
        return StreamExchange(bucket, group)
    return courier_between(group, world, timeout_s, KEY).send_quantized(bucket)
