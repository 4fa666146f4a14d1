"""How far replicas are apart at an average, as one number that is the same on every rank: what adaptive periods go by.

    E_m ||s_m - E_m[s]||^2 = E_m ||s_m||^2 - ||E_m[s]||^2

The first term is one float64 element that travels beside the state, the second is known where the mean has landed; each
is summed over the shards of a replica, in the order of its ranks. Both come from what an all-reduce gave to all
replicas alike: none decides by what only it has seen.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from deslo_plugin.averaging.flight import Flight
from deslo_plugin.averaging.instants import now, seconds_between
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.comm.transport import Transport, Work
from deslo_plugin.errors import require
from deslo_plugin.kernels.drift import measure

WORD = 8  # bytes of the element


class ReplicaVariance:
    """Launches and lands ``E_m ||s_m||^2`` beside the averages of adaptive states.

    ``on_average`` is told of the element's bytes as of more bytes of its state.
    """

    def __init__(self, average: Transport, on_average: Callable[[SyncEvent], object]):
        self.transport, self._on_average = average, on_average

    def start(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Work]:
        """Starts it for what is launched."""
        # where ranks hold copies each averages a word of its own, and every sum below counts them alike
        square = _square(tensors).repeat(self.transport.divisor)
        return square, self.transport.start(square)

    def land(self, steps: int, flights: Sequence[Flight], means: Sequence[Tensor]) -> float:
        """``sqrt(E_m ||s_m - mean||^2) / ||mean||`` of a state whose ``means`` have landed; 0 where all are zero.

        The same float on every rank. Collective over the replica's ranks. Raises ``AverageError`` on a time-out.
        """
        device = means[0].device
        start = now(device)
        squares = [require(flight.square) for flight in flights]
        for _, work in squares:
            work.wait()
        arrived = now(device)
        each = self.transport.total(sum((float(square[0]) for square, _ in squares), 0.0))
        mean = self.transport.total(float(_square(means)))
        waited = seconds_between(start, arrived)
        self._on_average(SyncEvent(steps, {flights[0].state: WORD * len(flights)}, waited, {}))
        return sqrt(max(each / mean - 1, 0.0)) if mean else 0.0 if each == 0 else float("inf")


def _square(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares, float64 without dimensions: of equal tensors the same bits, by the kernel that measures drift."""
    wide = [(tensor if tensor.dtype == torch.float64 else tensor.float()).contiguous() for tensor in tensors]
    return measure(wide, wide)[2]
