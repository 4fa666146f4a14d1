"""Any ``nn.Module`` as an objective: one functional call, vectorised over replicas."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


class Network:
    """The loss of a module on batches of each replica's own.

    Args:
        model: its forward takes one batch and returns a scalar loss. Its parameters, all of one dtype, are the start;
            buffers are constants. It must draw nothing at random and change nothing in place, as ``torch.func.vmap``
            asks.
        batches: (replicas, step) -> the tensors of a batch, each with a leading dimension of len(replicas).
        held_out: tensors of one batch that losses are judged on, or several such batches of one size.

    Raises ``ValueError`` for parameters of several dtypes, which one matrix cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[Sequence[int], int], Sequence[Tensor]],
        held_out: Sequence[Sequence[Tensor]],
    ):
        self._model, self._batches, self._held_out = model, batches, held_out
        if len(dtypes := {str(param.dtype) for param in model.parameters()}) != 1:
            raise ValueError(f"Network: expected parameters of one dtype, got {sorted(dtypes)}; convert the model")
        self._shapes = {name: param.shape for name, param in model.named_parameters()}
        self.start = torch.cat([param.detach().flatten() for param in model.parameters()])

    def losses(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        return vmap(self._loss)(x, *self._batches(replicas, step))

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        return torch.stack([torch.stack([self._loss(row, *batch) for batch in self._held_out]).mean() for row in x])

    def _loss(self, row: Tensor, *batch: Tensor) -> Tensor:
        parts = row.split([shape.numel() for shape in self._shapes.values()])
        params = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts)}
        return functional_call(self._model, params, batch)
