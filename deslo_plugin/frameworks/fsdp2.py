"""FSDP2 (``fully_shard``): each replica sharded on its own ranks, averages between equal shards.

Two ways lead there. A model sharded on the shard dimension alone, ``fully_shard(m, mesh=mesh["shard"])``, is used as it
is. A model sharded on the 2-D mesh is HSDP, which all-reduces every gradient across replicas; it is pointed at the
shard dimension instead, through attributes of torch that are not public, and a small model proves on every start that
this works. (``set_requires_all_reduce(False)`` would not: torch takes it for gradient accumulation, and nothing would
ever train.)"""

from weakref import ref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checkpoint.resharding import is_sharded, param_groups, reshard
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.comm.topology import Topology
from deslo_plugin.errors import ConfigError

REPLICATE = ("replicate", "dp_replicate")  # names under which the dimension across replicas is looked for


def reshard_at_steps(model: nn.Module, averaging: StateAverager) -> None:
    """What a step or an average writes is what the next forward gathers, whatever was left whole since the backward."""
    if not is_sharded(model):
        return
    of = ref(model)

    def act(*_: object) -> None:
        if (model := of()) is not None:
            reshard(model)

    averaging.optimizer.register_step_pre_hook(act)
    averaging.listeners.append(act)  # an average may land in a step that is left out


def topology_of(model: nn.Module, mesh: DeviceMesh | None, replicate: str | None) -> Topology:
    """Replicas along ``replicate`` of ``mesh``, or of the model's own mesh; a model sharded in one dimension alone
    shows by itself which ranks are one replica. Changes nothing. Collective.

    Raises ``ConfigError`` if there is no such dimension, no second replica, or if torch has changed.
    """
    if across := _across(model, replicate):
        own, name = across[0]
        for each, dimension in across:
            _prove(each, dimension)
        return topology_from_mesh(own if mesh is None else mesh, replicate if mesh is not None else name)
    if mesh is not None:
        return topology_from_mesh(mesh, replicate)
    own = _mesh_of(model)
    rows = sorted({tuple(ranks) for ranks in all_gather_by_rank(own.mesh.flatten().tolist()).values()})
    if len(rows) == 1 < len(rows[0]):
        raise ConfigError(
            "attach(model)",
            "a model sharded over the ranks of one replica",
            f"one sharded over all {len(rows[0])} ranks",
            "shard it on one dimension of a 2-D mesh: mesh = init_device_mesh(device, (replicas, ranks of a replica), "
            'mesh_dim_names=("replicate", "shard")); fully_shard(model, mesh=mesh["shard"])',
        )
    return Topology(tuple(rows), dist.get_rank())


def refuse_across(model: nn.Module, topology: Topology, replicate: str | None) -> None:
    """Raises ``ConfigError`` for a parameter that is sharded, or reduced, beyond this rank's replica."""
    for name, param in model.named_parameters():
        if not isinstance(param, DTensor):
            continue
        mesh = param.device_mesh
        across = _dimension(mesh, replicate) if is_sharded(model) else None  # HSDP is pointed at what is left
        ranks = mesh.mesh
        if across is not None:
            ranks = ranks.movedim(mesh.mesh_dim_names.index(across), 0)[mesh.get_local_rank(across)]
        if not set(ranks.flatten().tolist()) <= set(topology.shard_group):
            raise ConfigError(
                f"attach(model) parameter {name}",
                f"a DTensor over ranks of the replica {topology.shard_group}",
                f"one over ranks {ranks.flatten().tolist()}",
                "shard it on dimensions inside the replica, such as "
                'mesh["shard"], and name the one across replicas "replicate"',
            )


def keep_inside_replicas(model: nn.Module, replicate: str | None) -> None:
    """Points what is HSDP across replicas at its shard dimension."""
    for mesh, name in _across(model, replicate):
        _point_at_shards(model, mesh, name)


def forgotten(model: nn.Module) -> set[str]:
    """Plain parameters outside every module that was sharded; inside one they were left out by ``ignored_params``."""
    inside = {
        id(param) for module in model.modules() if isinstance(module, FSDPModule) for param in module.parameters()
    }
    return {name for name, param in model.named_parameters() if id(param) not in inside}


def not_sharded(model: nn.Module) -> list[str]:
    """Trained parameters beside the DTensors of the model, whose gradients nothing reduces inside a replica."""
    return [name for name, param in model.named_parameters() if param.requires_grad and not isinstance(param, DTensor)]


def topology_from_mesh(mesh: DeviceMesh, replicate: str | None) -> Topology:
    """The topology of a mesh over all ranks whose dimension ``replicate`` runs across replicas."""
    name = _dimension(mesh, replicate)
    if name is None:
        raise ConfigError(
            "attach(mesh=...)",
            f"a dimension named {replicate or ' or '.join(REPLICATE)}",
            f"{mesh.mesh_dim_names}",
            "name the dimension across replicas in init_device_mesh(..., mesh_dim_names=...), or pass replicate=its "
            "name",
        )
    if mesh.size() != dist.get_world_size():
        raise ConfigError(
            "attach(mesh=...)",
            f"a mesh over all {dist.get_world_size()} ranks",
            f"one over {mesh.size()}",
            "pass the mesh that init_device_mesh returned",
        )
    across = mesh.mesh.movedim(mesh.mesh_dim_names.index(name), 0)
    return Topology(tuple(map(tuple, across.reshape(len(across), -1).tolist())), dist.get_rank())


def copies_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks of a replica that hold the same shard: those that HSDP inside the replica replicates over."""
    if not any(placement.is_replicate() for param in _dtensors(model) for placement in param.placements):
        return None
    groups = [group.mesh_info for group in param_groups(model)]
    return getattr(groups[0], "replicate_process_group", None)


def _across(model: nn.Module, replicate: str | None) -> list[tuple[DeviceMesh, str]]:
    """(mesh, dimension across replicas) of the modules that HSDP reduces across replicas; none where nothing does,
    which a model sharded inside replicas shows without a look at what is private."""
    if not any(_dimension(param.device_mesh, replicate) for param in _dtensors(model)):
        return []
    meshes = [mesh for mesh in _meshes(model) if _dimension(mesh, replicate) is not None and mesh.ndim > 1]
    return [(mesh, _dimension(mesh, replicate)) for mesh in meshes]


def _dtensors(model: nn.Module) -> list[DTensor]:
    return [param for param in model.parameters() if isinstance(param, DTensor)]


def _mesh_of(model: nn.Module) -> DeviceMesh:
    meshes = _meshes(model)
    if len(meshes) != 1:
        raise ConfigError(
            "attach(model)",
            "one mesh for all modules that are sharded, or the mesh of all ranks as mesh=",
            f"{len(meshes)} meshes",
            "pass mesh=, the one that init_device_mesh returned",
        )
    return meshes[0]


def _meshes(model: nn.Module) -> list[DeviceMesh]:
    """Each once, of all modules that are sharded."""
    try:
        meshes = [group.mesh_info.mesh for group in param_groups(model)]
    except AttributeError as error:
        raise _moved(error) from error
    return list({(mesh.mesh_dim_names, tuple(mesh.mesh.flatten().tolist())): mesh for mesh in meshes}.values())


def _point_at_shards(model: nn.Module, mesh: DeviceMesh, replicate: str) -> None:
    """From HSDP to FSDP on the dimension that is left: gradients are reduced inside the replica and nowhere else."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

    (shard,) = (name for name in mesh.mesh_dim_names if name != replicate)
    inside = FSDPMeshInfo(mesh[shard], shard_mesh_dim=0)
    for group in param_groups(model):
        across = group.mesh_info
        if across.mesh != mesh:
            continue
        if (own := getattr(across, "reduce_scatter_process_group", None)) is not None:
            inside.reduce_scatter_process_group = own  # set_separate_reduce_scatter_group was called before
        for holder in (group, *group.fsdp_params):
            if holder.post_forward_mesh_info is across:  # else None, or a smaller group inside a replica
                holder.post_forward_mesh_info = inside
            holder.mesh_info = inside


def _prove(mesh: DeviceMesh, replicate: str) -> None:
    """One backward of a small model that is pointed likewise: its gradient must be the replica's own. Collective."""
    own = 1.0 + mesh.get_local_rank(replicate)
    model = nn.Linear(4, 4, bias=False, device=mesh.device_type)
    fully_shard(model, mesh=mesh)
    try:
        _point_at_shards(model, mesh, replicate)
        model(torch.full((1, 4), own, device=mesh.device_type)).sum().backward()
        gradient = model.weight.grad.to_local()
    except (AttributeError, ImportError) as error:
        raise _moved(error) from error
    if not torch.equal(gradient, torch.full_like(gradient, own)):
        raise _moved("a gradient still crosses replicas")


def _dimension(mesh: DeviceMesh, replicate: str | None) -> str | None:
    names = mesh.mesh_dim_names or ()
    return next((name for name in ([replicate] if replicate else REPLICATE) if name in names), None)


def _moved(what: object) -> ConfigError:
    return ConfigError(
        "attach(model)",
        "FSDP2 as in torch 2.13",
        f"torch {torch.__version__} ({what})",
        'shard on the shard dimension alone, which needs nothing private: fully_shard(model, mesh=mesh["shard"])',
    )
