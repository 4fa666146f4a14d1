"""Gradients inside a replica that no wrapper reduces: of parameters that several of its ranks hold alike, and of what
torch leaves as partial sums."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from deslo_plugin.kernels.local_tensors import local


class MeanInside:
    """Gradients of ``params`` are their mean over ``groups``, one after the other, when ``backward`` returns: before
    anything clips them.

    With gradient accumulation every backward averages what has accumulated, which is the same mean. A parameter that a
    rank did not use counts as zero there, one that none used keeps no gradient, as in DDP. Every rank must use some of
    ``params`` in each backward, as FSDP2 wants of its modules."""

    def __init__(self, params: Sequence[Tensor], groups: Sequence[dist.ProcessGroup]):
        self._params, self._groups, self._queued = params, groups, False
        for param in params:
            param.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, _: Tensor) -> None:
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        self._queued = False
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        gradients = [each.to_dense() if each.is_sparse else each for each in gradients]
        parts = local(gradients)
        used = torch.tensor([float(p.grad is not None) for p in self._params], device=parts[0].device)
        for tensors in _by_dtype([*parts, used]):
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            for group in self._groups:
                dist.all_reduce(flat.div_(group.size()), group=group)
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(mean.view_as(tensor))
        for param, gradient, share in zip(self._params, gradients, used.tolist()):
            param.grad = gradient if share else None


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def place_as_parameters(params: Iterable[Tensor]) -> None:
    """From now on each gradient of a DTensor is placed as its parameter is. Of what lies whole on each rank, such as a
    norm under sequence parallelism, torch leaves a partial sum: an update would take this rank's part alone."""

    def place(param: Tensor) -> None:
        gradient = param.grad
        if isinstance(param, DTensor) and isinstance(gradient, DTensor) and gradient.placements != param.placements:
            param.grad = gradient.redistribute(placements=param.placements)

    for param in params:
        if isinstance(param, DTensor) and param.requires_grad:
            param.register_post_accumulate_grad_hook(place)
