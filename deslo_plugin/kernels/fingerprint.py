"""``torch.ops.deslo.fingerprint``: whether tensors still hold what they held before, by one number of their bits.

    fingerprint(tensors) -> int64 without dimensions, on their device

A tensor, contiguous and of any dtype, is words of 32 bits in blocks of ``COLUMNS``; zeros fill up its last block. Each
word is multiplied by an odd number of its column and block, each block by an odd number of its own, and all of it is
summed modulo 2^64, in one pass over memory. So one word that changes always shows. Where several do, even in their
signs alone, they cancel each other out once in about 2^32. Shapes and dtypes are no part of it.

Here are the schema and the meaning, after csrc/fingerprint.h; the native module adds CPU and CUDA kernels. All give the
same number, whatever the device, the alignment, the threads and the instruction set."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deslo_plugin.kernels.argument_checks import refuse
from deslo_plugin.kernels.availability import define, settle

COLUMNS = 1 << 12  # words of a block
BLOCK_BYTES = 4 * COLUMNS
CACHED, QUEUED = 1 << 6, 1 << 12  # blocks that the reference takes: few for the caches of a CPU, many for a GPU's queue

_library = torch.library.Library("deslo", "FRAGMENT")


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """The operator on one tensor or more, of one device; those that are not contiguous are copied first."""
    settle(tensors[:1])
    return torch.ops.deslo.fingerprint([tensor.contiguous() for tensor in tensors])


def reference(tensors: Sequence[Tensor]) -> Tensor:
    """The operator made of torch's own."""
    _check(tensors)
    device = tensors[0].device
    total, first = torch.zeros((), dtype=torch.int64, device=device), 0
    columns = (_mixed(torch.arange(1, COLUMNS + 1, device=device)) | 1).to(torch.int32)  # signed, as words are
    for blocks in _blocks(tensors, CACHED if device.type == "cpu" else QUEUED):
        x = COLUMNS + 1 + 3 * torch.arange(first, first + len(blocks), device=device)
        flipped, factor = _mixed(x) & ~1, (_mixed(x + 1) << 32 | _mixed(x + 2)) | 1
        words = blocks.to(torch.int64).mul_(columns ^ flipped[:, None].to(torch.int32))
        total += (words.sum(1) * factor).sum()
        first += len(blocks)
    return total


def _blocks(tensors: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """The words of ``tensors``, a row for each block, up to ``count`` rows at once: small tensors are joined, large
    ones cut."""
    joined: list[Tensor] = []
    held = 0
    for tensor in tensors:
        for part in tensor.reshape(-1).view(torch.uint8).split(count * BLOCK_BYTES):
            rows, missing = -(-len(part) // BLOCK_BYTES), -len(part) % BLOCK_BYTES
            if joined and held + rows > count:
                yield torch.cat(joined).view(torch.int32).view(-1, COLUMNS)
                joined, held = [], 0
            joined += [part, part.new_zeros(missing)]
            held += rows
    if held:
        yield torch.cat(joined).view(torch.int32).view(-1, COLUMNS)


def _mixed(x: Tensor) -> Tensor:
    """A number of 32 bits without a pattern for each of 32 bits."""
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def _check(tensors: Sequence[Tensor]) -> None:
    """What csrc/torch/fingerprint_checks.h refuses, in its words."""
    if not tensors:
        refuse("tensors: expected one tensor or more, got an empty list")
    for i, tensor in enumerate(tensors):
        if tensor.device != tensors[0].device:
            refuse(f"tensors[{i}]: expected the device of tensors[0], got another")
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            refuse(f"tensors[{i}]: expected a contiguous tensor")


define(_library, "fingerprint(Tensor[] tensors) -> Tensor", reference)
torch.library.register_fake(
    "deslo::fingerprint", lambda tensors: tensors[0].new_empty((), dtype=torch.int64), lib=_library
)
