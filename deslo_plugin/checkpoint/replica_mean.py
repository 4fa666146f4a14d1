"""The mean of one tensor of the model over all replicas, beside training and its averages."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm.process_groups import Groups, reachable

EXTRA = "_extra_state"  # how torch ends the names of what ``get_extra_state()`` of a module gives: no weights


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this rank may hold a shard. Collective over the replica."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def averages(name: str, value: object) -> bool:
    """Whether an entry of a state dict is a tensor of the model."""
    return isinstance(value, Tensor) and not name.endswith(EXTRA)


def mean_of(full: Tensor, group: dist.ProcessGroup | None, dtype: torch.dtype | None = None) -> Tensor:
    """The mean of ``full`` over the ranks of ``group`` on the CPU, in ``dtype``, or in float32 or what is wider; of
    whole numbers the first rank's. Collective."""
    return _mean(full.detach(), group).to("cpu", dtype)


def mean_shard(shard: Any, groups: Groups) -> Tensor:
    """The mean of a DTensor over replicas, sharded as it is, in its dtype and on its device. Collective."""
    own = shard.detach().to_local()
    mean = _mean(own, groups.replica).to(own.device, own.dtype)
    return type(shard.detach()).from_local(
        mean, shard.device_mesh, shard.placements, shape=shard.shape, stride=shard.stride()
    )


def _mean(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if not (own.is_floating_point() or own.is_complex()):
        first = own.contiguous().clone()
        if group is not None:
            first = reachable(first, group)
            dist.broadcast(first.view(-1).view(torch.uint8), group_src=0, group=group)
        return first
    mean = own.to(torch.promote_types(own.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    if group is not None:  # over the world: the ranks of a replica hold the same, so that it is the replicas' mean
        mean = reachable(mean, group)
        dist.all_reduce(torch.view_as_real(mean) if mean.is_complex() else mean, op=dist.ReduceOp.AVG, group=group)
    return mean
