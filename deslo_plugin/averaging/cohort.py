"""What averages together: parameters that stand at one step, or a fragment of them."""

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from deslo_plugin.algorithm.rules import Tensors

Key = Tensor | tuple[Tensor, int]
"""What names a part: its parameter, with the fragment where that is cut."""


class Rows(NamedTuple):
    """``size`` rows along dimension ``dim`` of a parameter that has ``of``."""

    start: int
    size: int
    of: int
    dim: int = 0

    def part(self, tensor: Tensor) -> Tensor:
        """These rows of a state of the parameter, a view. One with other rows goes with the first of them, whole."""
        if tensor.dim() > self.dim and tensor.shape[self.dim] == self.of:
            return tensor.narrow(self.dim, self.start, self.size)
        return tensor[None].narrow(0, 0, int(self.start == 0 and self.size > 0))


class Cohort(NamedTuple):
    """Parameters of one param group and device that have completed the same number of steps, with the same periods
    now; of a ``fragment``, those of which it has ``rows``."""

    steps: int
    group: MutableMapping[str, Any]
    params: list[Tensor]
    periods: dict[str, int | None]
    rows: tuple[Rows, ...] | None = None
    fragment: int = 0

    @property
    def keys(self) -> Sequence[Key]:
        """The names of its parts."""
        if self.rows is None:
            return self.params
        return [(param, self.fragment) for param in self.params]

    def parts(self, tensors: Tensors) -> Tensors:
        """What belongs to it of ``tensors``, one of each parameter, as views."""
        return tensors if self.rows is None else [rows.part(tensor) for rows, tensor in zip(self.rows, tensors)]
