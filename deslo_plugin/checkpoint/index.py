"""Where in which file each piece of a saved tree lies, in JSON: ``torch.distributed.checkpoint`` would run its own
index.

DCP writes the tensors, and its pickled ``.metadata`` for tools that know it, which nothing here reads.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from deslo_plugin.checkpoint.location import Store, flush, in_object_store
from deslo_plugin.checkpoint.tensor_chunks import LoadTensorChunks, SaveTensorChunks
from deslo_plugin.comm.all_or_none import Elsewhere, to_os_error
from deslo_plugin.errors import ConfigError

INDEX = "index.json"


class Place(NamedTuple):
    """``length`` bytes of a file from ``offset`` on, by the names that DCP's reader uses."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def write_tree(
    tree: Mapping[str, Any], folder: Path, group: dist.ProcessGroup | None, *, on_host: bool = False
) -> None:
    """Writes one tree of all ranks of ``group``, and its index. Collective over them. Raises ``Elsewhere`` for an
    error. ``on_host``: no tensor of it is on a GPU, and no stream is asked for."""
    writer = _Writer(folder, on_host)
    with _named(group):
        dcp.save(
            dict(tree), storage_writer=writer, process_group=group, planner=SaveTensorChunks(flatten_state_dict=False)
        )


def read_tree(
    tree: dict[str, Any], folder: Path, index: Metadata, group: dist.ProcessGroup | None, *, alone: bool = False
) -> None:
    """Reads into ``tree``, in place. Collective over ``group``, or ``alone``. Raises ``Elsewhere`` for an error."""
    with _named(None if alone else group):
        dcp.load(
            tree,
            storage_reader=_Reader(folder, index),
            process_group=group,
            no_dist=alone,
            planner=LoadTensorChunks(flatten_state_dict=False),
        )


def read_index(folder: Path) -> Metadata:
    """Raises ``ConfigError`` for what no save of ours has written, and for pieces outside ``folder``."""
    file = folder / INDEX
    try:
        return _parsed(json.loads(file.read_bytes()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            str(file), "an index of tensors as it was written", repr(error), "take another checkpoint"
        ) from error


def tensors_of(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Those entries of the tree that are tensors: what is said of each."""
    return {
        name: stored for name, stored in index.state_dict_metadata.items() if isinstance(stored, TensorStorageMetadata)
    }


class _named:
    """Turns DCP's error, which is no ``Exception``, into the one that it tells of, with its rank."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, CheckpointException):
            number, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
            raise Elsewhere(
                number if self.group is None else dist.get_global_rank(self.group, number), cause
            ) from error


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path, on_host: bool):
        remote, ahead = in_object_store(folder), 0 if on_host else 10_000_000  # bytes, DCP's own
        super().__init__("" if remote else folder, sync_files=not remote, per_thread_copy_ahead=ahead)
        if remote:
            self.fs, self.path = Store(), folder
        self.folder = folder

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:  # it will be sent to other ranks, and not every error can be
            raise to_os_error(error, f"{self.path}/{plan.storage_data.prefix}0.distcp") from error

    def finish(self, metadata: Metadata, results: Any) -> None:
        try:
            super().finish(metadata, results)
            with (self.folder / INDEX).open("wb") as file:
                file.write(json.dumps(_written(metadata, results)).encode())
                flush(file)
        except Exception as error:
            raise to_os_error(error, self.folder / INDEX) from error


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, index: Metadata):
        remote = in_object_store(folder)
        super().__init__("" if remote else folder)
        if remote:
            self.fs, self.path = Store(), folder
        self._index = index

    def read_metadata(self) -> Metadata:
        return self._index

    def read_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().read_data(plan, planner)
        except Exception as error:
            raise to_os_error(error, self.path) from error


def _written(metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> dict[str, Any]:
    """Places are taken from ``results`` of each rank: torch up to 2.11 fills them into a copy of ``metadata``."""
    places = {
        (written.index.fqn, written.index.offset): [
            written.storage_data.relative_path,
            written.storage_data.offset,
            written.storage_data.length,
        ]
        for of_rank in results
        for written in of_rank
    }
    tensors, values = {}, {}
    for name, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            pieces = [[list(chunk.offsets), list(chunk.sizes), *places[name, chunk.offsets]] for chunk in stored.chunks]
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(stored.size), "pieces": pieces}
        else:
            values[name] = places[name, None]
    return {"tensors": tensors, "values": values}


def _parsed(content: Any) -> Metadata:
    stored: dict[str, Any] = {}
    places: dict[MetadataIndex, Place] = {}
    for name, tensor in content["tensors"].items():
        dtype, chunks = getattr(torch, tensor["dtype"]), []
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype {tensor['dtype']!r}")
        for offset, size, *place in tensor["pieces"]:
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
            places[MetadataIndex(name, offset)] = _place(*place)
        stored[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(tensor["shape"]), chunks)
    for name, place in content["values"].items():
        stored[name], places[MetadataIndex(name)] = BytesStorageMetadata(), _place(*place)
    return Metadata(stored, storage_data=places, storage_meta=StorageMeta())


def _place(file: str, at: int, length: int) -> Place:
    if Path(file).name != file or type(at) is not int or type(length) is not int:
        raise ValueError(f"a piece in {file!r}, {length!r} bytes from {at!r}")
    return Place(file, at, length)
