"""Whether tensors still hold what they held before: one number of their bits, on their device, in two passes.

Words, of 32 bits at most, lie in rows of ``COLUMNS``. Each row and each column is summed, and each of these sums
multiplied by an odd number of its own, modulo 2^64: one word that changes always shows. Where several do, they cancel
each other out in their rows and in their columns alike, or once in 2^33."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COLUMNS = 1 << 12
# words summed at a time: few for the caches of a CPU, many for the queue of a GPU
CACHED, QUEUED = 1 << 18, 1 << 26
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by bytes of an element


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Int64 without dimensions, of ``tensors`` (one or more, of one device, any shapes, strides and dtypes)."""
    device = tensors[0].device
    columns, sums = torch.zeros(COLUMNS, dtype=torch.int64, device=device), []
    for words in _parts(tensors, CACHED if device.type == "cpu" else QUEUED):
        whole = words.numel() // COLUMNS * COLUMNS
        if whole:
            rows = words[:whole].view(-1, COLUMNS)
            columns += rows.sum(0, dtype=torch.int64)
            sums.append(rows.sum(1, dtype=torch.int64))
        sums.append(words[whole:].to(torch.int64))  # each as a column of its own
    flat = torch.cat([columns, *sums])
    return (flat * _odd(len(flat), device)).sum()


def _parts(tensors: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """The words of ``tensors`` in order, about ``size`` at once: small tensors are joined, large ones cut."""
    joined: list[Tensor] = []
    held = 0  # words in joined
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
        if joined and held + words.numel() > size:
            yield torch.cat(joined)
            joined, held = [], 0
        if words.numel() > size:
            yield from words.split(size)
        else:
            joined.append(words)
            held += words.numel()
    if joined:
        yield torch.cat(joined)


def _odd(count: int, device: torch.device) -> Tensor:
    """``count`` odd numbers without a pattern: what changes in a pattern must not cancel out."""
    mixed = torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        mixed = (mixed ^ (mixed >> 29)) * factor
    return (mixed ^ (mixed >> 32)) | 1
