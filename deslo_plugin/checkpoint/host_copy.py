"""A copy of what is saved that training cannot change any more: in pinned host memory where it lay on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.checkpoint.tensor_chunks import TensorChunks, of_dtensor


def host_copy(value: Any) -> Any:
    """``value``, a tree or plain values, with every tensor copied. Copies from a GPU are queued on its current stream,
    in front of the next step's writes: ``when_copied()``, called after this, gives the wait until they have come."""
    if isinstance(value, TensorChunks):
        return value.like([_copied(piece) for _, piece in value.pieces])
    if hasattr(value, "to_local"):
        return host_copy(of_dtensor(value))
    if isinstance(value, Tensor):
        return _copied(value.detach())
    if isinstance(value, dict):
        return type(value)({key: host_copy(each) for key, each in value.items()})
    return type(value)(map(host_copy, value)) if type(value) in (list, tuple) else value


def when_copied() -> Callable[[], object]:
    """What waits, in any thread, until all that the current stream was given has happened."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return torch.cuda.current_stream().record_event().synchronize


def _copied(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
