"""What of a tensor lies on this rank: a DTensor's local shard, any other tensor itself."""

from collections.abc import Iterable

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
