"""One model out of many replicas."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.frameworks.attachment import attachments_of
from deslo_plugin.frameworks.one_model import one_replica


@torch.no_grad()
def averaged_state_dict(model: Any, *, as_trained: bool = False) -> dict[str, Tensor]:
    """The model's state dict with the mean of all replicas' parameters on the CPU; training is not touched.

    Args:
        model: a DeepSpeed engine, or a model that ``attach`` was called with. An engine without replicas has one model.
        as_trained: every tensor in the dtype that it has in the model, instead of float32.

    Collective over all ranks; needs room for one whole parameter more on each device. Floating buffers are averaged as well.
    """
    if not isinstance(model, nn.Module) or hasattr(model, "basic_optimizer"):
        from deslo_plugin.frameworks.deepspeed.export import full_params

        module, params, world = model.module, full_params(model), dist.group.WORLD
    else:
        world = attachments_of(model, "averaged_state_dict")[0].groups.world
        module = model.module if isinstance(model, DistributedDataParallel) else model
        params = _whole(module)
    with one_replica():
        saved = set(module.state_dict(keep_vars=True))
    state = {}
    for name, buffer in module.named_buffers():
        if name in saved:
            state[name] = _mean(buffer, world) if buffer.is_floating_point() else buffer.detach().cpu()
    state |= {name: _mean(param, world) for name, param in params}
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.to(own[name].dtype) for name, tensor in state.items()} if as_trained else state


def _whole(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, param in module.named_parameters():
        yield name, param.full_tensor() if hasattr(param, "full_tensor") else param


def _mean(tensor: Tensor, world: dist.ProcessGroup | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().cpu()  # of no optimizer's: the same on all replicas
    mean = tensor.detach().to(torch.float32, copy=True)
    if world is not None:
        dist.all_reduce(mean, op=dist.ReduceOp.AVG, group=world)  # the ranks of a replica hold the same: the replicas' mean
    return mean.cpu()
