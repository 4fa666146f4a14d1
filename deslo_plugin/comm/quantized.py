"""A quantised average between M replicas: all-to-all of records, their mean in float32, all-gather of its records.

Each replica takes the mean of one M-th, so that it sends 2 (M - 1) / M of the records however many there are, and all
of them decode the same bytes: what lands is bit-equal everywhere. What a replica holds of its own M-th is not rounded
on the way to itself. What is lost is known where it was lost: of the values at the replica that sent them, of the mean
at the one that took it, as what that replica would have had to send more. So the mean over replicas of what each has
lost is what the mean that landed lacks (``carry``).
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from deslo_plugin.comm.transport import Tensors
from deslo_plugin.kernels.availability import settle
from deslo_plugin.kernels.quantize import BLOCK, Format, blocks_of


class QuantizedBucket:
    """Tensors on their way in few bits.

    Args:
        values: as this rank holds them: float32, bfloat16 or float16 of any shapes, which stay as they are until
            ``carry``.
        bases: what all replicas hold alike and need not send, or nothing; float32 of those shapes.
        errors: what was lost of the last average, or nothing; likewise.
        weight: what this replica counts, or None where all count alike.
        copies: ranks of a replica that hold the same and split it, of which this is number ``copy``.
        replicas: how many average, of which this is number ``replica``.
    """

    def __init__(
        self,
        values: Tensors,
        bases: Tensors,
        errors: Tensors,
        format: Format,
        weight: float | None,
        *,
        copies: int,
        copy: int,
        replicas: int,
        replica: int,
    ):
        self.values = [value.contiguous() for value in values]
        self.bases, self.errors, self.format, self.weight = bases, errors, format, weight
        self.copy, self.replica = copy, replica
        device, total = values[0].device, sum(blocks_of(value.numel()) for value in values)
        part = -(-total // (copies * replicas))  # blocks of which one rank takes the mean
        self.sent = torch.empty(copies, replicas, part, format.record_bytes, dtype=torch.uint8, device=device)
        self.own = torch.empty(copies, part, BLOCK, device=device)
        self.gathered = torch.empty_like(self.sent)
        self.weights = torch.full((replicas,), 1 / replicas)
        settle(values[:1])
        first = (copy * replicas + replica) * part
        torch.ops.deslo.quantize(
            self.values, bases, errors, self.sent.flatten(0, 2), self.own[copy], first, format.number
        )

    @property
    def mine(self) -> Tensor:
        """What this rank sends, a part to each replica: uint8 (replicas, blocks, bytes of a record)."""
        return self.sent[self.copy]

    @property
    def rest(self) -> Tensor:
        """Of the part that is this rank's: what it holds of it, then what its mean has lost; float32 (blocks,
        BLOCK)."""
        return self.own[self.copy]

    @property
    def nbytes(self) -> int:
        """What this rank sends, but for the factor of every all-reduce, 2 (1 - 1/M)."""
        return self.mine.nbytes + (4 if self.weight is not None else 0)

    def mean(self, received: Tensor, own: Tensor) -> Tensor:
        """Records of the mean of ``received``, this rank's part as each replica has sent it, and of its ``own``, which
        then is what they lack."""
        codes = torch.empty_like(received[0])
        weights = self.weights.to(own.device)
        torch.ops.deslo.mean_quantized(received, own, weights / weights.sum(), self.replica, codes, self.format.number)
        return codes

    @cached_property
    def views(self) -> list[Tensor]:
        """The means, float32, in the shapes of the values."""
        means = [torch.empty(value.shape, device=value.device) for value in self.values]
        torch.ops.deslo.dequantize(self.gathered.flatten(0, 2), self.bases, means, self.format.number)
        return means

    @property
    def chunks(self) -> Tensors:
        """All that has landed."""
        return self.views

    def carry(self, seats: Sequence[int]) -> None:
        """``bases`` become the means, and ``errors`` what was lost, of the tensors in ``seats``: before the means are
        written into the values."""
        whole = len(seats) == len(self.values)
        lost = self.errors if whole else [error.clone() for error in self.errors]
        means = self.views if self.bases and whole else []
        torch.ops.deslo.carry_(
            self.values, self.bases, lost, means, self.sent, self.own, self.replica, self.format.number
        )
        for seat in () if whole else seats:
            for mine, new in ((self.errors, lost), (self.bases, self.views)):
                if mine:
                    mine[seat].copy_(new[seat])
