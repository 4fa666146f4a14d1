"""A list of tensors as one flat wire buffer and back: every element travels once, none is skipped."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


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
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    total = ends[-1]
    padded = -(-total // divisor) * divisor
    flat = torch.empty(padded, dtype=dtype, device=tensors[0].device)
    flat[total:].zero_()
    views = [flat[end - tensor.numel() : end].view(tensor.shape) for tensor, end in zip(tensors, ends)]
    torch._foreach_copy_(views, list(tensors))
    chunk = max(1, chunk_bytes // (flat.element_size() * divisor)) * divisor
    return Bucket(flat.split(chunk) if padded else (), views)
