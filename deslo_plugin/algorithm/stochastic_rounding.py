"""Stochastic rounding to bfloat16, for states that move by less than bfloat16 can tell apart.

v <- 0.999 v + 0.001 g^2 changes v by a tenth of a per cent, of which the 8 bits of bfloat16 see nothing: rounded to
nearest it stands still. Rounded up with the probability of what is cut off, it is right on average.

The draws are a hash of (t, state, index): ``t`` counts the updates before this one, ``state`` is 0 for v and j for u_j,
and ``index`` counts the elements of the tensor in memory, modulo 2^32. There is no seed and no generator: results are a
function of the inputs on every device, equal replicas stay equal, and a resumed run draws what the straight one draws.
Tensors of one shape share their draws. csrc/numbers.h draws the same.
"""

import torch
from torch import Tensor

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def round_(target: Tensor, value: Tensor, t: int, state: int) -> None:
    """target <- value, rounded at random. bfloat16 and float32, of one shape and one dense layout; NaN stays NaN."""
    flat, wide = _in_memory(target), _in_memory(value)
    noise = draws(flat.numel(), t, state, device=flat.device).to(torch.int32)
    up = (wide.view(torch.int32) + noise).bitwise_right_shift(16).to(torch.int16).view(torch.bfloat16)
    flat.copy_(torch.where(wide.isnan(), wide.to(torch.bfloat16), up))


def draws(count: int, t: int, state: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The 16 random bits of the elements 0 .. count of one state: (count,) int64 in [0, 2^16)."""
    first, second = _key(t, state)
    h = torch.arange(count, device=device) & MASK32 ^ first
    h = (h ^ h >> 16) * 0x7FEB352D & MASK32 ^ second
    h = (h ^ h >> 15) * 0x846CA68B & MASK32
    return h >> 16


def _key(t: int, state: int) -> tuple[int, int]:
    """SplitMix64 of (t, state), as two halves."""
    z = (t * 32 + state + 1) * 0x9E3779B97F4A7C15 & MASK64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
    z ^= z >> 31
    return z & MASK32, z >> 32


def _in_memory(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory, as a view."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
