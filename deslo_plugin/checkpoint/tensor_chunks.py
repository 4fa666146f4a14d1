"""A rank's part of a sharded tensor, as ``torch.distributed.checkpoint`` wants to hear of it: boxes of the whole
tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType

from deslo_plugin.errors import require


@dataclass(frozen=True)
class TensorChunks:
    """``pieces`` of a tensor of ``shape``: where each begins in it, and the live tensor that is read and written there.

    Has the methods by which DTensor tells checkpoints of its shards, so that what is saved is one tensor of ``shape``,
    which any other sharding, or plain torch, can load; ``SaveTensorChunks`` and ``LoadTensorChunks`` are the planners
    for it."""

    shape: torch.Size
    pieces: tuple[tuple[tuple[int, ...], Tensor], ...]

    def like(self, tensors: Sequence[Tensor]) -> "TensorChunks":
        """Other contents for the same pieces."""
        return TensorChunks(self.shape, tuple((offset, tensor) for (offset, _), tensor in zip(self.pieces, tensors)))

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(piece), self.shape),
            )
            for chunk, (_, piece) in zip(self.__create_chunk_list__(), self.pieces)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), piece.shape) for offset, piece in self.pieces]

    def at(self, index: MetadataIndex) -> Tensor:
        return next(piece for own, piece in self.pieces if own == tuple(require(index.offset)))


class SaveTensorChunks(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.at(index) if isinstance(value, TensorChunks) else super().lookup_object(index)


class LoadTensorChunks(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As the default does, but for a pass over ``state_dict`` that makes None of what it does not know."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """A number that a stock optimizer counts in; the default runs what it reads."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        return value.at(index) if isinstance(value, TensorChunks) else super().lookup_tensor(index)


def of_dtensor(tensor: Any) -> TensorChunks:
    """What a DTensor keeps on this rank."""
    own, chunks = tensor.to_local(), tensor.__create_chunk_list__()
    return TensorChunks(tensor.shape, tuple((tuple(chunk.offsets), own) for chunk in chunks if own.numel()))


def of_range(flat: Tensor, start: int, shape: torch.Size) -> TensorChunks:
    """The elements from ``start`` on of a tensor of ``shape``, row after row, which lie in the 1-D ``flat``."""
    if not prod(shape):
        return TensorChunks(shape, ((tuple(0 for _ in shape), flat.view(shape)),))
    pieces, taken = [], 0
    for offset, size in boxes(start, start + flat.numel(), tuple(shape)):
        pieces.append((offset, flat[taken : taken + prod(size)].view(size)))
        taken += prod(size)
    return TensorChunks(shape, tuple(pieces))


def boxes(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts the elements [start, stop) of a row-major tensor into boxes, in order: (offset, size) of each.

    Two partial rows with whole rows between them, and so on inside the partial rows.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _inside(last, start - last * row, stop - last * row, shape)
        return
    yield from _inside(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _inside(last, 0, stop - last * row, shape)


def _inside(
    row: int, start: int, stop: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, size in boxes(start, stop, shape[1:]):
        yield (row, *offset), (1, *size)
