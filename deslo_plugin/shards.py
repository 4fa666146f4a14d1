"""What of a tensor lies on this rank: a DTensor's local shard, any other tensor itself."""

from collections.abc import Sequence

from torch import Tensor


def local(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """This rank's parts, sharing memory with ``tensors``; averages and updates go element by element."""
    if not any(hasattr(kind, "to_local") for kind in {type(tensor) for tensor in tensors}):
        return tensors
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
