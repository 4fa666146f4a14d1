"""How replicas that are rows average: the mean over rows, as it is or in few bits."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from deslo_plugin.comm.quantized import QuantizedBucket
from deslo_plugin.comm.transport import Quantized, SingleReplica, Tensors, Work
from deslo_plugin.kernels.quantize import Format


class RowMean(SingleReplica):
    """The ``Transport`` of M replicas in one process: a chunk is M rows of n elements, and each becomes their mean.

    ``divisor`` is M: each replica sends its row of a chunk, and bytes are counted as one replica's.
    """

    def __init__(self, replicas: int):
        self.seat(replicas)

    def seat(self, replicas: int) -> None:
        self.divisor = self.replicas = replicas

    def start(self, chunk: Tensor) -> Work:
        rows = chunk.view(self.replicas, -1)
        rows.copy_(rows.mean(0))
        return super().start(chunk)

    def start_quantized(
        self, values: Tensors, bases: Tensors, errors: Tensors, format: Format, weight: float | None
    ) -> tuple[Quantized, Work]:
        rows = [
            QuantizedBucket(
                [each[row] for each in values],
                [each[row] for each in bases],
                [each[row] for each in errors],
                format,
                weight,
                copies=1,
                copy=0,
                replicas=self.replicas,
                replica=row,
            )
            for row in range(self.replicas)
        ]
        records = [row.mean(torch.stack([each.mine[i] for each in rows]), row.rest) for i, row in enumerate(rows)]
        for row in rows:
            row.gathered[0] = torch.stack(records)
        return QuantizedRows(rows), super().start(rows[0].sent)


class QuantizedRows:
    """The averages in few bits of all replicas: each tensor is M rows, and each row one replica's."""

    def __init__(self, rows: Sequence[QuantizedBucket]):
        self.rows, self.nbytes, self.weights = rows, rows[0].nbytes, rows[0].weights

    @cached_property
    def views(self) -> list[Tensor]:
        return [torch.stack(tensors) for tensors in zip(*(row.views for row in self.rows))]

    @property
    def chunks(self) -> Tensors:
        return self.views

    def carry(self, seats: Sequence[int]) -> None:
        for row in self.rows:
            row.carry(seats)
