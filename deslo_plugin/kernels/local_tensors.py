"""What of a tensor lies on this rank: a DTensor's local shard, any other tensor itself."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.rules import Tensors


def local(tensors: Tensors) -> Tensors:
    """This rank's parts, sharing memory with ``tensors``; averages and updates go element by element."""
    if not any(hasattr(kind, "to_local") for kind in {type(tensor) for tensor in tensors}):
        return tensors
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def gradients_of(params: Iterable[Tensor]) -> Tensors:
    """This rank's part of the gradient of each of ``params`` that has one; of a sparse one the values."""
    found = [param.grad for param in params if param.grad is not None]
    return local([gradient._values() if gradient.is_sparse else gradient for gradient in found])


def states_of(states: Mapping[Tensor, Mapping[str, Any]], name: str, params: Tensors) -> Tensors:
    """This rank's part of that state of each of ``params``; zeros where there is none yet."""
    found = [states[param].get(name) for param in params]
    return local([torch.zeros_like(params[i]) if each is None else each for i, each in enumerate(found)])
