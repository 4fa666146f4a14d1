"""Tensors that a script has laid out anew, as ``model.to(memory_format=torch.channels_last)`` does, after their states
were made."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.errors import ConfigError, require
from deslo_plugin.kernels.local_tensors import local


@contextmanager
def alike(tensors: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The lists ``x``, ``g``, ``u`` (a list of lists) and perhaps ``v`` in the strides of ``x``: copies where they have
    others, written back at the end, but for ``g``. What of ``x`` has gaps between its elements is copied without."""
    lists = {
        name: [local(each) for each in value] if name == "u" else [local(value)] for name, value in tensors.items()
    }
    (x,) = lists["x"]
    strides = [torch.empty_like(each, device="meta").stride() for each in x]
    copies = {name: [_copied(each, strides) for each in of_name] for name, of_name in lists.items()}
    yield {name: of_name if name == "u" else of_name[0] for name, of_name in copies.items()}
    for name in lists.keys() - {"g"}:
        for originals, made in zip(lists[name], copies[name]):
            for original, copy in zip(originals, made):
                if copy is not original:
                    original.copy_(copy)


def _copied(tensors: Sequence[Tensor], strides: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [
        tensor if tensor.stride() == stride else tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)
        for tensor, stride in zip(tensors, strides)
    ]


def refuse_sparse(params: Iterable[Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Raises ``ConfigError`` for the first of ``params`` whose gradient is not dense."""
    for param in params:
        gradient = require(param.grad)
        if gradient.layout != torch.strided:
            raise ConfigError(
                f"gradient of parameter {name_of(param)}",
                "a dense one",
                str(gradient.layout),
                "build its module with sparse=False, or attach SparseAdam for it",
            )
