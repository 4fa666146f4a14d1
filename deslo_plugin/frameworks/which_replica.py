"""Which ranks are one replica, as the wrappers of a model have it."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.checkpoint.resharding import param_groups
from deslo_plugin.checks import module_wrappers as wrappers
from deslo_plugin.comm.process_groups import Groups
from deslo_plugin.comm.topology import Topology
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks import ddp, fsdp2


def topology_of(
    model: nn.Module,
    ddps: Sequence[DistributedDataParallel],
    config: Config,
    mesh: DeviceMesh | None,
    replicate: str | None,
    process_group: dist.ProcessGroup | None,
) -> Topology:
    size = config.deslo.replica_size
    if ddps and fsdp2.is_sharded(model):
        raise ConfigError(
            "attach(model)", "DDP or fully_shard", "both", "remove DDP: fully_shard reduces gradients in a replica"
        )
    if ddps:
        topology = ddp.topology_of(ddps, config.deslo)
    elif fsdp2.is_sharded(model):
        topology = fsdp2.topology_of(model, mesh, replicate)
    elif mesh is not None:
        topology = fsdp2.topology_from_mesh(mesh, replicate)
    else:
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        topology = Topology(tuple((rank,) for rank in ranks), dist.get_rank())
    if size not in ("auto", topology.replica_size):
        raise ConfigError(
            "deslo.replica_size",
            f"{topology.replica_size}, as the model and its mesh have it",
            str(size),
            "remove it, or wrap the model in DDP or FSDP2, which reduce gradients inside a replica",
        )
    return topology


def group_inside(model: nn.Module, ddps: Sequence[DistributedDataParallel], groups: Groups) -> dist.ProcessGroup:
    """The process group of this replica: that of the model's wrapper, so that NCCL keeps one communicator, or ours."""
    meshes = [group.mesh_info for group in param_groups(model)]
    theirs = [each.process_group for each in ddps] + [getattr(mesh, "shard_process_group", None) for mesh in meshes]
    own = groups.topology.shard_group
    return next((each for each in theirs if each and dist.get_process_group_ranks(each) == own), groups.shard)


def refuse_across_replicas(
    model: nn.Module, ddps: Sequence[DistributedDataParallel], topology: Topology, config: Config, replicate: str | None
) -> None:
    if topology.replicas > 1:
        wrappers.refuse_across(model, topology)
        fsdp2.refuse_across(model, topology, replicate)
        if ddps:
            ddp.refuse(model, ddps, topology, config.deslo.synchronous_steps > 0)
