"""Replicas must start equal: the same model, the same values, the same optimizer on every rank, or an error before step 1."""

import logging
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deslo_plugin.adaptive import adaptive
from deslo_plugin.agreement import agree, digests
from deslo_plugin.averaging import Averaging
from deslo_plugin.collectives import Groups, gathered
from deslo_plugin.config import Config, as_dict
from deslo_plugin.log import say
from deslo_plugin.ops import native
from deslo_plugin.strict import plain
from deslo_plugin.topology import Topology, spread

SEED_ALIKE = 'seed every rank alike, or set "deslo": {"initial_params": "broadcast"} to start from replica 0'


def local_world_size() -> int:
    """Ranks on this node, as the launcher said: torchrun's LOCAL_WORLD_SIZE, the deepspeed launcher's LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())


def say_placement(topology: Topology, world: dist.ProcessGroup) -> None:
    """Warns if a replica lies on more nodes than it needs. Collective."""
    hosts = gathered(socket.gethostname(), world)
    if complaint := spread(topology, [hosts[rank] for rank in topology.ranks]):
        say(complaint, logging.WARNING)


def agree_on_model(model: nn.Module, shape_of: Callable[[Tensor], object], group: dist.ProcessGroup | None = None) -> None:
    """Raises ``ConfigError`` on every rank if parameters differ in name, shape, dtype or in being trained."""
    agree("model parameter", model_traits(model, shape_of), do="build the same model on every rank", group=group)


def model_traits(model: nn.Module, shape_of: Callable[[Tensor], object]) -> dict[str, str]:
    """Parameter name -> shape, dtype and whether it is trained: what replicas must have alike."""
    return {
        name: f"{tuple(shape_of(p))} {p.dtype}{'' if p.requires_grad else ' frozen'}" for name, p in model.named_parameters()
    }


def agree_on_optimizer(averaging: Averaging, config: Config, world: dist.ProcessGroup | None = None) -> None:
    """Raises ``ConfigError`` on every rank if configs or param groups differ."""
    agree("optimizer", optimizer_traits(averaging, config), do="build the same optimizer on every rank", group=world)


def optimizer_traits(averaging: Averaging, config: Config) -> dict[str, Any]:
    """Setting -> value, of both blocks and of the param groups: what replicas must have alike."""
    of_groups = {
        f"param group {index}.{key}": plain(group[key])
        for index, group in enumerate(averaging.optimizer.param_groups)
        for key in ("lr", "weight_decay", "sync_every") if key in group
    }
    kind = {"type": type(averaging.optimizer).__name__}
    if any(adaptive(group["sync_every"]) for group in averaging.groups):
        kind["kernels, which measure what adaptive periods go by,"] = f"{native()} on {_device_of(averaging)}"
    return as_dict(config) | of_groups | kind


def _device_of(averaging: Averaging) -> str:
    devices = {param.device for param in averaging.optimizer.state}
    return ", ".join(sorted({torch.cuda.get_device_name(each) if each.type == "cuda" else each.type for each in devices}))


def equal_replicas(
    whole: Mapping[str, Tensor], sharded: Mapping[str, Tensor], initial: str, groups: Groups,
    stage: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Makes replicas equal (``initial`` "broadcast") and raises ``ConfigError`` on every rank if they are not.

    Args:
        whole: tensors that every rank of every replica must hold alike.
        sharded: tensors that each rank must hold like its peers in the other replicas.
        stage: copies a tensor to where the process groups reach it.
    """
    if initial == "broadcast":
        for tensors, group, source in (
            (whole, groups.world, groups.topology.rows[0][0]), (sharded, groups.replica, groups.topology.replica_group[0])
        ):
            for tensor in tensors.values():
                staged = stage(tensor.detach())
                dist.broadcast(staged, src=source, group=group)
                with torch.no_grad():
                    tensor.copy_(staged)
    what = "initial value of parameter"
    agree(what, digests(whole.items()), do=SEED_ALIKE, group=groups.world)
    agree(what, digests(sharded.items()), do=SEED_ALIKE, group=groups.world, among=groups.topology.columns)
