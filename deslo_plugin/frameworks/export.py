"""One model out of many replicas."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deslo_plugin.frameworks.attachment import attachments_of
from deslo_plugin.frameworks.state_tree import saved_state

EXTRA = "_extra_state"  # how torch ends the names of what ``get_extra_state()`` of a module gives


@torch.no_grad()
def averaged_state_dict(
    model: Any, *, as_trained: bool = False, of: nn.Module | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The model's state dict with the mean of all replicas' parameters on the CPU; training is not touched.

    It has the names that ``state_dict()`` of the plain model has, in their order, each name of a shared tensor among them: DDP,
    ``torch.compile`` and activation checkpointing leave no trace in them. Floating and complex buffers are averaged as well,
    whole numbers are those of the first rank, and what ``get_extra_state()`` gives is this rank's own.

    Args:
        model: a DeepSpeed engine, or a model that ``attach`` was called with. An engine without replicas has one model.
        as_trained: every tensor in the dtype that it has in the model, instead of float32 (float64 and complex ones stay).
        of: takes the mean of this instead, a module or a mapping of names to tensors that every rank has beside the model, with
            the same names and shapes: a moving average of the weights (``torch.optim.swa_utils.AveragedModel``), a momentum
            encoder, or any copy that each replica keeps for itself.

    Collective: call it on every rank of all replicas, never on one alone. Needs room for one whole tensor more on each device.
    Raises ``ConfigError`` for a model that nothing is attached to, and on ranks that others leave alone in it.
    """
    if not isinstance(model, nn.Module) or hasattr(model, "basic_optimizer"):
        from deslo_plugin.frameworks.deepspeed.export import whole_of

        module, whole, world = model.module, whole_of(model), dist.group.WORLD
    else:
        module, whole, world = model, gathered_whole, attachments_of(model, "averaged_state_dict")[0].groups.world
    live = dict(of) if isinstance(of, Mapping) else saved_state(module if of is None else of)
    means: dict[int, Any] = {}  # by identity: a tensor of several names is averaged once
    for name, value in live.items():
        if id(value) not in means:
            averages = isinstance(value, Tensor) and not name.endswith(EXTRA)
            full = whole if of is None else gathered_whole
            means[id(value)] = mean_of(full(value), world, value.dtype if as_trained else None) if averages else value
    return {name: means[id(value)] for name, value in live.items()}


def gathered_whole(tensor: Tensor) -> Tensor:
    """The whole of which this rank may hold a shard. Collective over the replica."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_of(full: Tensor, world: dist.ProcessGroup | None, dtype: torch.dtype | None = None) -> Tensor:
    """The mean of ``full`` over all ranks on the CPU, in ``dtype``, or in float32 or what is wider; of whole numbers the first
    rank's. Collective."""
    full = full.detach()
    if not (full.is_floating_point() or full.is_complex()):
        own = full.contiguous().clone()
        if world is not None:
            dist.broadcast(own.view(-1).view(torch.uint8), group_src=0, group=world)
        return own.cpu()
    mean = full.to(torch.promote_types(full.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    if world is not None:  # the ranks of a replica hold the same: the replicas' mean
        dist.all_reduce(torch.view_as_real(mean) if mean.is_complex() else mean, op=dist.ReduceOp.AVG, group=world)
    return mean.to("cpu", dtype)
