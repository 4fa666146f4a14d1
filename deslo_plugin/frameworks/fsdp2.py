"""FSDP2 (``fully_shard``): each replica sharded on its own ranks, averages between equal shards.

Two ways lead there. A model sharded on the shard dimension alone, ``fully_shard(m, mesh=mesh["shard"])``, is used as it
is. A model sharded on the 2-D mesh is HSDP, which all-reduces every gradient across replicas; it is pointed at the
shard dimension instead, through attributes of torch that are not public, and a small model proves on every start that
this works. (``set_requires_all_reduce(False)`` would not: torch takes it for gradient accumulation, and nothing would
ever train.)"""

import logging
from collections.abc import Sequence
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checkpoint.resharding import param_groups, reshard
from deslo_plugin.checks.replica_checks import listed
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.comm.topology import Topology, topology_of_groups
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.frameworks.gradients_inside import MeanInside
from deslo_plugin.frameworks.plain import Plain, dimension_across, topology_from_mesh
from deslo_plugin.log import log_rank0


class FSDP2(Plain):
    """A model sharded inside replicas, whose mesh says which ranks are one, or by HSDP over all of them."""

    def topology(self) -> Topology:
        """Raises ``ConfigError`` if there is no dimension across replicas, no second replica, or if torch has
        changed."""
        across = _across(self.model, self.replicate)
        for mesh, name in across:
            _prove(mesh, name)
        if self.mesh is not None:
            return super().topology()
        if across:
            return topology_from_mesh(*across[0])
        own = _mesh_of(self.model).mesh.flatten().tolist()
        found = topology_of_groups(all_gather_by_rank(own).values(), dist.get_rank())
        if found.replicas == 1 < found.replica_size:
            raise ConfigError(
                "attach(model)",
                "a model sharded over the ranks of one replica",
                f"one sharded over all {found.replica_size} ranks",
                "shard it on one dimension of a 2-D mesh: mesh = init_device_mesh(device, (replicas, ranks of a "
                'replica), mesh_dim_names=("replicate", "shard")); fully_shard(model, mesh=mesh["shard"])',
            )
        return found

    def ranks_of(self, param: DTensor) -> list[int]:
        return _inside(param.device_mesh, self.replicate)

    def refuse(self, topology: Topology) -> None:
        super().refuse(topology)
        left_out = list(self._left_out())
        if left_out and len({tuple(_inside(mesh, self.replicate)) for mesh in _meshes(self.model)}) > 1:
            raise ConfigError(
                f"attach(model) parameter {left_out[0]}",
                "every trained parameter in a module of fully_shard, where modules are sharded over several meshes",
                "one in none",
                "call fully_shard on the whole model too, which tells the ranks that reduce its gradient",
            )

    def forgotten(self) -> set[str]:
        """Parameters outside every module that was sharded; inside one ``ignored_params`` left them out."""
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        inside = {id(param) for module in sharded for param in module.parameters()}
        return {name for name, param in self.model.named_parameters() if id(param) not in inside}

    def _left_out(self) -> dict[str, Tensor]:
        """Those of ``forgotten`` that train, and that the ranks of a shard group hold alike: not cut over them, nor
        under a name of their own, as experts may be."""
        forgotten = self.forgotten()
        found = {name: p for name, p in self.model.named_parameters() if name in forgotten and p.requires_grad}
        if not found:
            return {}
        shards = set(_inside(_meshes(self.model)[0], self.replicate))

        def alike(name: str, param: Tensor) -> bool:
            everywhere = self.holders.get(name, len(shards)) >= len(shards)
            return everywhere and not (isinstance(param, DTensor) and len(shards & set(self.ranks_of(param))) > 1)

        return {name: param for name, param in found.items() if alike(name, param)}

    def own_groups(self) -> Sequence[dist.ProcessGroup]:
        """Points what is HSDP across replicas at its shard dimension first."""
        for mesh, name in _across(self.model, self.replicate):
            _point_at_shards(self.model, mesh, name)
        groups = [getattr(group.mesh_info, "shard_process_group", None) for group in param_groups(self.model)]
        return [group for group in groups if group]

    def copies(self, groups: Groups) -> dist.ProcessGroup | None:
        """Those that HSDP inside the replica replicates over."""
        if not any(placement.is_replicate() for param in _dtensors(self.model) for placement in param.placements):
            return None
        return getattr(next(param_groups(self.model)).mesh_info, "replicate_process_group", None)

    def keep_gradients_inside(self, averaging: StateAverager, groups: Groups) -> None:
        super().keep_gradients_inside(averaging, groups)
        reshard_at_steps(self.model, averaging)
        if not self.first or groups.topology.replica_size == 1:
            return
        if left_out := self._left_out():
            MeanInside(list(left_out.values()), self._shard_groups())
            log_rank0(
                f"deslo: {listed(left_out)} are trained and not sharded: their gradients are averaged inside a replica "
                "after every backward; fully_shard on the whole model too does that once a step"
            )
        plain = [name for name, p in self.model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if ignored := [name for name in plain if name not in left_out and self.holders.get(name, 2) > 1]:
            log_rank0(
                f"deslo: {listed(ignored)} are trained, and ignored_params of fully_shard: nothing reduces their "
                "gradients inside a replica, whose ranks go apart unless you do",
                logging.WARNING,
            )

    def _shard_groups(self) -> list[dist.ProcessGroup]:
        """Over which a sharded module reduces its gradients inside a replica, one after the other."""
        info = next(param_groups(self.model)).mesh_info
        found = (getattr(info, name, None) for name in ("shard_process_group", "replicate_process_group"))
        return [group for group in found if group is not None]


def reshard_at_steps(model: nn.Module, averaging: StateAverager) -> None:
    """What a step or an average writes is what the next forward gathers, whatever was left whole since the backward."""
    of = ref(model)

    def act(*_: object) -> None:
        if (model := of()) is not None:
            reshard(model)

    averaging.optimizer.register_step_pre_hook(act)
    averaging.listeners.append(act)  # an average may land in a step that is left out


def _across(model: nn.Module, replicate: str | None) -> list[tuple[DeviceMesh, str]]:
    """(mesh, dimension across replicas) of the modules that HSDP reduces across replicas; none where nothing does,
    which a model sharded inside replicas shows without a look at what is private."""
    if not any(dimension_across(param.device_mesh, replicate) for param in _dtensors(model)):
        return []
    found = [(mesh, dimension_across(mesh, replicate)) for mesh in _meshes(model) if mesh.ndim > 1]
    return [(mesh, across) for mesh, across in found if across is not None]


def _dtensors(model: nn.Module) -> list[DTensor]:
    return [param for param in model.parameters() if isinstance(param, DTensor)]


def _inside(mesh: DeviceMesh, replicate: str | None) -> list[int]:
    """The ranks of ``mesh`` in this rank's replica: those that HSDP reduces over once it is pointed at what is left."""
    ranks = mesh.mesh
    if (across := dimension_across(mesh, replicate)) is not None:
        ranks = ranks.movedim(require(mesh.mesh_dim_names).index(across), 0)[mesh.get_local_rank(across)]
    return ranks.flatten().tolist()


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

    (shard,) = (name for name in require(mesh.mesh_dim_names) if name != replicate)
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
        gradient = require(model.weight.grad).to_local()  # type: ignore[attr-defined]  # a DTensor
    except (AttributeError, ImportError) as error:
        raise _moved(error) from error
    if not torch.equal(gradient, torch.full_like(gradient, own)):
        raise _moved("a gradient still crosses replicas")


def _moved(what: object) -> ConfigError:
    return ConfigError(
        "attach(model)",
        "FSDP2 as in torch 2.13",
        f"torch {torch.__version__} ({what})",
        'shard on the shard dimension alone, which needs nothing private: fully_shard(model, mesh=mesh["shard"])',
    )
