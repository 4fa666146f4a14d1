"""Moments in the time of a device: the host runs ahead of a GPU, and what it waits for there may be computation."""

import time

import torch

Instant = float | torch.cuda.Event
"""A moment of the host, by ``time.perf_counter``, or of a GPU's current stream."""


def now(device: torch.device) -> Instant:
    """On a GPU the moment when all that is queued on its current stream will be done; it is not waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Instant, end: Instant) -> float:
    """Waits until ``end`` has come."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    if isinstance(start, float) or isinstance(end, float):
        raise TypeError("seconds_between: expected two moments of one device")
    end.synchronize()
    return start.elapsed_time(end) / 1e3
