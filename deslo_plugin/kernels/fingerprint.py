"""Whether tensors still hold what they held before: one number of their bits, on their device, in one pass.

Each word, of 32 bits at most, is multiplied by an odd number of its column and each row of columns by one of the row,
and all of it is summed modulo 2^64: one word that changes always shows, and where several do, even in their signs
alone, they cancel each other out once in 2^33.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COLUMNS = 1 << 12
# words multiplied at a time: few for the caches of a CPU, many for the queue of a GPU
CACHED, QUEUED = 1 << 16, 1 << 22
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by bytes of an element


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Int64 without dimensions, of ``tensors`` (one or more, of one device, any shapes, strides and dtypes)."""
    device = tensors[0].device
    column = _odd(COLUMNS, device)
    rows = [row for part in _parts(tensors, CACHED if device.type == "cpu" else QUEUED) for row in _rows(part, column)]
    sums = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), *rows])  # of no words: 0
    return (sums * _odd(len(sums), device)).sum()


def _parts(tensors: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """The words of ``tensors`` in order, about ``size`` at once: small tensors are joined, large ones cut."""
    joined: list[Tensor] = []
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
        if joined and sum(map(len, joined)) + len(words) > size:
            yield torch.cat(joined)
            joined = []
        if len(words) > size:
            yield from words.split(size)
        else:
            joined.append(words)
    if joined:
        yield torch.cat(joined)


def _rows(words: Tensor, column: Tensor) -> Iterator[Tensor]:
    whole = len(words) // COLUMNS * COLUMNS
    for rows in (words[:whole].view(-1, COLUMNS), words[whole:].view(1, -1)):
        if rows.numel():
            yield rows.to(torch.int64).mul_(column[: rows.shape[1]]).sum(1)


def _odd(count: int, device: torch.device) -> Tensor:
    """``count`` odd numbers without a pattern: what changes in a pattern must not cancel out."""
    mixed = torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        mixed = (mixed ^ (mixed >> 29)) * factor
    return (mixed ^ (mixed >> 32)) | 1
