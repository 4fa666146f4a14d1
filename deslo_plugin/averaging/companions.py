"""Floating buffers of a model, such as running statistics: averaged when parameters are, as they are at that moment."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deslo_plugin.algorithm.outer_optimizer import mean_
from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.algorithm.state_names import BUFFERS, PARAMS
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.flight import Flight, Weigh
from deslo_plugin.averaging.last_average import LastAverage
from deslo_plugin.averaging.synchronizer import Synchronizer


class Companions:
    """``buffers`` of any devices, which ``sync`` averages."""

    def __init__(self, buffers: Tensors, sync: Synchronizer):
        by_device: dict[torch.device, list[Tensor]] = {}
        for buffer in buffers:
            by_device.setdefault(buffer.device, []).append(buffer)
        self._sync, self._of_devices = sync, list(by_device.values())
        self._flights: list[Flight] = []
        self._steps = 0

    def launch(self, meeting: Sequence[Cohort], weigh: Callable[[Cohort, str], Weigh | None]) -> None:
        """Starts them, if parameters of the first fragment are ``meeting`` now: replicas count as there."""
        for cohort in [cohort for cohort in meeting if cohort.fragment == 0][:1]:
            self._steps, weight = cohort.steps, weigh(cohort, PARAMS)
            for buffers in self._of_devices:
                self._sync.announce(cohort.steps)
                flight = self._sync.start(cohort.steps, BUFFERS, buffers, buffers, weight and weight(BUFFERS))
                self._flights.append(flight)

    def land(self, kept: LastAverage | None) -> None:
        """Writes the means, where they have arrived everywhere; what was launched is ``kept``, if somebody wants it."""
        flights, self._flights = self._flights, []
        for buffers, flight in zip(self._of_devices, flights):
            seats = [(flight, seat) for seat in range(len(buffers))]
            if means := self._sync.land(self._steps, {BUFFERS: seats}, {BUFFERS: buffers}):
                mean_(buffers, means[BUFFERS])
                if kept:
                    kept.take(self._steps, buffers, buffers)
