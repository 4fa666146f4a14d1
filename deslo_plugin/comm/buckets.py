"""A list of tensors as one flat wire buffer and back: every element travels once, none is skipped."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

ALIGNED = 4  # elements


@dataclass(frozen=True)
class Bucket:
    """``chunks`` tile the flat buffer and travel one by one; ``views`` are its slices in the shapes that were
    packed."""

    chunks: tuple[Tensor, ...]
    views: list[Tensor]


def pack(tensors: Sequence[Tensor], dtype: torch.dtype, chunk_bytes: int, divisor: int = 1) -> Bucket:
    """Copies ``tensors`` (one or more, any shapes and dtypes, one device) into a new flat buffer of ``dtype``.

    The buffer is padded with zeros to a multiple of ``divisor`` elements, and cut into chunks of at most about
    ``chunk_bytes``, each a multiple of ``divisor`` too.
    """
    # those last whose end would leave what follows unaligned: kernels take four elements at a time
    order = sorted(range(len(tensors)), key=lambda seat: tensors[seat].numel() % ALIGNED > 0)
    ends = list(accumulate(tensors[seat].numel() for seat in order))
    total = ends[-1]
    padded = -(-total // divisor) * divisor
    flat = torch.empty(padded, dtype=dtype, device=tensors[0].device)
    flat[total:].zero_()
    end_of = dict(zip(order, ends))
    views = [flat[end_of[i] - each.numel() : end_of[i]].view(each.shape) for i, each in enumerate(tensors)]
    torch._foreach_copy_(views, list(tensors))
    chunk = max(1, chunk_bytes // (flat.element_size() * divisor)) * divisor
    return Bucket(flat.split(chunk) if padded else (), views)
