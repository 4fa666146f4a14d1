"""Which ranks are one replica that comes and goes: all of this process's world, and what reduces gradients among them
does so by itself."""

from collections.abc import Collection
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deslo_plugin.checkpoint.resharding import is_sharded, param_groups
from deslo_plugin.checks.module_wrappers import reducers, saved_buffers
from deslo_plugin.checks.replica_checks import INITIAL, agree_on_model, listed
from deslo_plugin.comm.consistency import check_same_on_all_ranks, digests
from deslo_plugin.comm.process_groups import Groups
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.live_state import refuse_cuts


def groups_inside(manager: Any) -> Groups:
    """The ranks of this replica, which are the world of this process. Raises ``ConfigError`` if ``manager`` is of
    other ranks."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for name, wanted in (("world_size", size), ("rank", rank)):
        got = getattr(manager, f"_group_{name}", "none, as in another torchft")
        if got != wanted:
            raise ConfigError(
                f"torchft.Manager({name}=...)",
                f"{wanted}, as in torch.distributed: its world is the ranks of one replica",
                str(got),
                "start each replica in a world of its own, and give every rank of it a manager of its own, with "
                "rank=dist.get_rank(), world_size=dist.get_world_size() and one store",
            )
    world = dist.group.WORLD if size > 1 else None
    return Groups(contiguous(size, rank, size), world=world, shard=world, replica=None, singleton=None)


def refuse_outside(around: nn.Module, model: nn.Module, size: int) -> None:
    """Raises ``ConfigError`` unless what reduces gradients of ``model`` does so among all ``size`` ranks, for every
    trained parameter. Not collective."""
    if size > 1 and not is_sharded(model) and not reducers(around):
        raise ConfigError(
            "attach(manager=...)",
            "a model that FSDP2 or DDP holds together on the ranks of a replica",
            f"a bare one on {size} ranks",
            "call fully_shard(model) or DistributedDataParallel(model) over all of them, or start each rank alone",
        )
    if is_sharded(model):
        refuse_cuts(model)
        over = {tuple(sorted(group.mesh_info.mesh.mesh.flatten().tolist())) for group in param_groups(model)}
    else:
        over = {tuple(sorted(dist.get_process_group_ranks(each.process_group))) for each in reducers(around)}
    if over - {tuple(range(size))}:
        raise ConfigError(
            "attach(manager=...)",
            f"a model over all {size} ranks of the replica",
            f"one over ranks {sorted(map(list, over))}",
            "wrap it on a mesh, or a process group, of the whole world: other replicas are no part of it",
        )
    if left := [name for name, param in around.named_parameters() if param.requires_grad and not _held(around, param)]:
        raise ConfigError(
            "attach(manager=...)",
            "every trained parameter in a module of fully_shard, or in DDP",
            f"{listed(left)} in none",
            "wrap the whole model, without ignored parameters",
        )


def refuse_unlike(model: nn.Module, groups: Groups) -> None:
    """Raises ``ConfigError`` on every rank unless the ranks of this replica have one model, and alike what is not
    sharded. Collective over the replica's ranks."""
    if groups.world is not None:
        agree_on_model(model, lambda param: param.shape, groups.world)
        whole = {name: param for name, param in model.named_parameters() if not isinstance(param, DTensor)}
        alike = digests({**whole, **saved_buffers(model)}.items())
        check_same_on_all_ranks(INITIAL, alike, do="seed every rank of a replica alike", group=groups.world)


def copies_inside(around: nn.Module, model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks of this replica that hold the same tensors: DDP's, or those over which HSDP replicates shards."""
    if is_sharded(model):
        return getattr(next(param_groups(model)).mesh_info, "replicate_process_group", None)
    ddps = reducers(around)
    return ddps[0].process_group if ddps and ddps[0].process_group.size() > 1 else None


def _held(around: nn.Module, param: Tensor) -> bool:
    """Whether something reduces the gradient of ``param`` inside a replica."""
    if isinstance(param, DTensor):
        return True
    ddps = reducers(around)
    held: Collection[int] = {
        id(each) for ddp in ddps for name, each in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore
    }
    return id(param) in held if ddps else not is_sharded(around)
