"""Any ``nn.Module`` as an objective: one functional call, vectorised over replicas, or one for each."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


class Network:
    """The loss of a module on batches of each replica's own.

    Args:
        model: its forward takes one batch and returns a scalar loss. Its parameters, all of one dtype, are the start;
            buffers are constants. It must change nothing in place and, if ``vectorised``, draw nothing at random, as
            ``torch.func.vmap`` asks.
        batches: (replicas, step) -> the tensors of a batch, each with a leading dimension of len(replicas).
        held_out: tensors of one batch that losses are judged on, or several such batches of one size.
        vectorised: False calls the model once for each replica: for models that ``vmap`` cannot, and where one
            replica's batch fills a GPU.

    Raises ``ValueError`` for parameters of several dtypes, which one matrix cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[Sequence[int], int], Sequence[Tensor]],
        held_out: Sequence[Sequence[Tensor]],
        *,
        vectorised: bool = True,
    ):
        self._model, self._batches, self._held_out = model, batches, held_out
        self._vectorised = vectorised
        if len(dtypes := {str(param.dtype) for param in model.parameters()}) != 1:
            raise ValueError(f"Network: expected parameters of one dtype, got {sorted(dtypes)}; convert the model")
        self._shapes = {name: param.shape for name, param in model.named_parameters()}
        self.start = torch.cat([param.detach().flatten() for param in model.parameters()])

    def losses(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        batches = self._batches(replicas, step)
        if self._vectorised:
            with _attention_that_vmap_knows(x.device):
                return vmap(self._loss)(x, *batches)
        return torch.stack([self._loss(*own) for own in zip(x, *batches)])

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        return torch.stack([torch.stack([self._loss(row, *batch) for batch in self._held_out]).mean() for row in x])

    def _loss(self, row: Tensor, *batch: Tensor) -> Tensor:
        parts = row.split([shape.numel() for shape in self._shapes.values()])
        params = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts)}
        return functional_call(self._model, params, batch)


def _attention_that_vmap_knows(device: torch.device) -> AbstractContextManager[None]:
    """Under ``vmap`` cuDNN's attention, torch's first choice on an H100, gives wrong gradients and NaN, and the
    memory-efficient one raises (measured with torch 2.11)."""
    if device.type != "cuda":
        return nullcontext()
    kinds: AbstractContextManager[None] = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    return kinds
