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
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    if isinstance(start, torch.cuda.Event) or isinstance(end, torch.cuda.Event):
        raise TypeError("seconds_between: expected two moments of one device")
    return end - start
