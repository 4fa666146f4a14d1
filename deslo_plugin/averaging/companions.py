"""Floating buffers of a model, such as running statistics: averaged when parameters are, as they are at that moment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deslo_plugin.algorithm.outer_optimizer import mean_
from deslo_plugin.algorithm.state_names import BUFFERS
from deslo_plugin.averaging.synchronizer import Synchronizer, Weigh


class Companions:
    """``buffers`` of any devices, which ``sync`` averages. ``weigh`` is what replicas count, as of the parameters."""

    def __init__(self, buffers: Sequence[Tensor], sync: Synchronizer):
        by_device: dict[torch.device, list[Tensor]] = {}
        for buffer in buffers:
            by_device.setdefault(buffer.device, []).append(buffer)
        self._sync, self._of_devices = sync, list(by_device.values())

    def launch(self, steps: int, weigh: Weigh | None) -> None:
        for buffers in self._of_devices:
            self._sync.launch(steps, buffers, {BUFFERS: buffers}, weigh)

    def land(self, steps: int) -> None:
        """Writes the means, where they have arrived everywhere."""
        for buffers in self._of_devices:
            if means := self._sync.land(steps, buffers, {BUFFERS: buffers}):
                mean_(buffers, means[BUFFERS])
