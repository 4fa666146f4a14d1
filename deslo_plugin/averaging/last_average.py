"""The parameters and buffers as their last average left them, on the host: one model that a rank can save without the
others."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.averaging.flight import States
from deslo_plugin.kernels.local_tensors import local


class LastAverage:
    """Copies of this rank's parts, in their own dtypes, made while all replicas hold the same.

    Costs one copy of the parameters in the host's memory, and one copy to the host at each of their averages.
    ``outer``: what lands is not the mean, but what the outer optimizer makes of it, which is the same on all replicas
    too."""

    def __init__(self, outer: bool = False):
        self._outer = outer
        self._copies: dict[Tensor, Tensor] = {}
        self._steps: dict[Tensor, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def take(self, steps: int, tensors: Tensors, values: Sequence[Tensor]) -> None:
        """Keeps ``values``, this rank's parts of ``tensors`` after ``steps`` steps."""
        for tensor, own, value in zip(tensors, local(tensors), values):
            if tensor not in self._copies:
                self._copies[tensor] = torch.empty_like(own, device="cpu", memory_format=torch.contiguous_format)
            self._copies[tensor].copy_(value)
            self._steps[tensor] = steps

    def landed(self, steps: int, params: Tensors, states: States, means: States) -> None:
        """Keeps the parameters that have landed, if any have."""
        if PARAMS in means:
            self.take(steps, params, states[PARAMS] if self._outer else means[PARAMS])

    def forget(self) -> None:
        """Something else was loaded: what is kept is of another run."""
        self._steps.clear()

    def forgot(self, tensor: Tensor) -> bool:
        """Whether there was a copy of ``tensor``."""
        return tensor in self._copies and tensor not in self._steps

    def of(self, tensor: Tensor) -> "Kept | None":
        return Kept(self._copies[tensor], self._steps[tensor]) if tensor in self._steps else None


class Kept(NamedTuple):
    """``copy`` was made after ``steps`` steps."""

    copy: Tensor
    steps: int
