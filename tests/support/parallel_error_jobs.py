"""Mistakes with parallelism inside a replica, each on every rank of a ``Processes`` world."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.attaching import adamw, config, error_of
from tests.support.parallel_models import Experts, net
from tests.support.torch_jobs import mesh_of

Mistake = tuple[nn.Module, Any, dict[str, Any]]


def _mesh() -> DeviceMesh:
    return mesh_of((2, 2), ("replicate", "part"))


def _stage(index: int) -> nn.Module:
    layers = list(net().named_children())
    return nn.Sequential(OrderedDict(layers[3:] if index else layers[:3]))


def across_replicas() -> Mistake:
    stage = _stage(_mesh().get_local_rank("replicate"))
    return stage, adamw(stage), {"mesh": _mesh()}


def without_mesh() -> Mistake:
    stage = _stage(_mesh().get_local_rank("part"))
    return stage, adamw(stage), {}


def names_of_others() -> Mistake:
    stage = nn.Linear(6, 3) if _mesh().get_local_rank("part") else nn.Linear(3, 6)
    return stage, adamw(stage), {"mesh": _mesh()}


def values_of_others() -> Mistake:
    torch.manual_seed(_mesh().get_local_rank("part"))
    stage = nn.Linear(6, 6)
    return stage, adamw(stage), {"mesh": _mesh()}


def other_groups() -> Mistake:
    stage = _stage(_mesh().get_local_rank("part"))
    groups = [{"params": [param]} for param in stage.parameters()]
    groups = groups if _mesh().get_local_rank("part") else [{"params": list(stage.parameters())}]
    return stage, torch.optim.AdamW(groups, lr=1e-2), {"mesh": _mesh()}


def frozen_stage() -> Mistake:
    stage = _stage(_mesh().get_local_rank("part"))
    stage.requires_grad_(_mesh().get_local_rank("part") == 1)
    return stage, adamw(stage), {"mesh": _mesh()}


def other_degree() -> Mistake:
    """Experts cut over the ranks of replica 0, and whole on each of replica 1."""
    mesh, model = _mesh(), net()
    placement = Shard(0) if mesh.get_local_rank("replicate") == 0 else Replicate()
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh["part"], [placement]))
    return model, adamw(model), {"mesh": mesh}


def other_experts() -> Mistake:
    """Peers hold each other's experts."""
    mesh = _mesh()
    model = Experts([mesh.get_local_rank("part") ^ mesh.get_local_rank("replicate")])
    return model, adamw(model), {"mesh": mesh}


def left_out_of_several() -> Mistake:
    mesh, model = mesh_of((2, 1, 2), ("replicate", "a", "b")), net()
    fully_shard(model[1], mesh=mesh["a"])
    fully_shard(model[3], mesh=mesh["b"])
    return model, adamw(model), {"mesh": mesh}


def ddp_on_a_mesh() -> Mistake:
    model = DistributedDataParallel(net())
    return model, adamw(model), {"mesh": _mesh()}


ddp_on_a_mesh.options = {"replica_size": 4}  # type: ignore[attr-defined]

MISTAKES: dict[str, tuple[Callable[[], Mistake], str]] = {
    "stages across replicas": (across_replicas, "model parameter .*pass mesh=.*peers hold one part"),
    "stages without mesh": (without_mesh, "model parameter .*pass mesh=, the mesh of all ranks"),
    "a name for two shapes": (names_of_others, "model parameter weight: expected .6, 3. .* of a replica .*rank.s. .1"),
    "a name for two values": (values_of_others, "parameter weight: expected one value .*or give a part .*ModuleDict"),
    "other param groups": (other_groups, "optimizer param group .*as many param groups for each part"),
    "a frozen stage": (frozen_stage, "optimizer param group 0.params: expected none that trains .*got some that train"),
    "another degree": (other_degree, "model parameter 1.weight: expected .*over 2 ranks.*got .*rank.s. .2.*cut alike"),
    "other experts": (other_experts, "model parameter experts.0.*got nothing on rank.s. .2.*peers hold one part"),
    "left out of several meshes": (left_out_of_several, "parameter 0.weight: expected every trained parameter in"),
    "DDP on a mesh": (ddp_on_a_mesh, "attach.model, mesh=.*: expected the replicas that DDP has, .*fully_shard"),
}


def refused(kind: str) -> str:
    import deslo_plugin

    build = MISTAKES[kind][0]
    model, optimizer, where = build()
    return error_of(lambda: deslo_plugin.attach(model, optimizer, config(**getattr(build, "options", {})), **where))


def uneven(wrap: str) -> str:
    """Three ranks are a replica, and the fourth another."""
    import deslo_plugin

    groups = [dist.new_group(ranks) for ranks in ([0, 1, 2], [3])]
    own, model = groups[dist.get_rank() == 3], net()
    if wrap == "fsdp":
        fully_shard(model, mesh=DeviceMesh.from_group(own, "cpu"))
    else:
        model = DistributedDataParallel(model, process_group=own)
    return error_of(lambda: deslo_plugin.attach(model, adamw(model), config()))
