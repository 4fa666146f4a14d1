"""Vectors of random numbers for kernels that read several tensors."""

import torch

SIZES = [0, 1, 3, 15, 16, 17, 63, 64, 65, 1000, 4095, 4096, 4097, 100_003]


def randn(numel, dtype, seed, offset=0):
    """Standard normal numbers, ``offset`` elements into their storage: unaligned if that is odd."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(offset + numel, generator=generator, dtype=torch.float64).to(dtype)[offset:]
