"""Orthogonal directions for matrices: what Muon makes of a momentum.

A direction d = U S V^T becomes about U V^T, by the quintic iteration of Newton and Schulz with the coefficients of
Muon's author (K. Jordan, 2024), in which singular values end between 0.7 and 1.2 rather than at 1. Nothing depends on
the length of d, so that a momentum needs no bias correction.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # the least length that a direction is divided by
NS_DTYPES = ("bfloat16", "float32")

ADJUST_LR: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
"""Name, as ``torch.optim.Muon`` has it -> what the rate of a matrix is multiplied by: Muon's author's, and that of
arXiv 2502.16982, with which an element moves about as far as AdamW would move it, at AdamW's rate."""


@dataclass(frozen=True, kw_only=True)
class Orthogonal:
    """How directions become orthogonal: ``ns_steps`` iterations in ``ns_dtype`` (float64 directions in float64), times
    what ``adjust_lr_fn`` says of the shape."""

    ns_steps: int
    ns_dtype: str
    adjust_lr_fn: str

    def __call__(self, d: Tensor) -> Tensor:
        """The orthogonal direction of a whole matrix ``d``, (rows, columns), in its dtype. Not in place."""
        dtype = torch.float64 if d.dtype == torch.float64 else getattr(torch, self.ns_dtype)
        factor = ADJUST_LR[self.adjust_lr_fn](*d.shape)
        return newton_schulz(d.to(dtype), self.ns_steps).to(d.dtype) * factor


def newton_schulz(d: Tensor, steps: int) -> Tensor:
    """About U V^T of d = U S V^T, (rows, columns), in the dtype of ``d``; zeros for zeros."""
    a, b, c = COEFFICIENTS
    tall = d.shape[0] > d.shape[1]
    z = d.mT if tall else d  # the smaller products
    z = z / z.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = z @ z.mT
        z = torch.addmm(z, torch.addmm(gram, gram, gram, beta=b, alpha=c), z, beta=a)
    return z.mT if tall else z
