"""What stands around a model or an optimizer: unwrapped where it is known, refused where it shards or communicates by
itself."""

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from deslo_plugin.comm.topology import Topology
from deslo_plugin.errors import ConfigError

engines: "WeakSet[Any]" = WeakSet()
"""DeepSpeed engines of this process, by which a module that one of them trains is known."""

JSON = (
    'write the two blocks "optimizer" and "deslo" in the DeepSpeed JSON, and do not call attach: '
    "engine.deslo is there then"
)
SHARD = (
    "shard it with torch.distributed.fsdp.fully_shard over the ranks of one replica (Accelerate: fsdp_version: 2), "
    'mesh=mesh["shard"] of mesh = init_device_mesh(device, (replicas, ranks of a replica), '
    'mesh_dim_names=("replicate", "shard"))'
)
DDP = "wrap it in torch.nn.parallel.DistributedDataParallel, or leave it bare: every rank is a replica then"

MODULES = {  # name of a class of modules -> what it does by itself, and what to do
    "FullyShardedDataParallel": ("reduces gradients over all its ranks and keeps flat shards", SHARD),
    "ShardedDataParallel": ("reduces gradients over all its ranks", SHARD),
    "DistributedModelParallel": ("shards tables over all its ranks", SHARD),
    "ReplicateModule": ("reduces gradients over all its ranks", DDP),
    "DistributedDataParallel": ("is not torch's and reduces gradients over all its ranks", DDP),
    "PureDistributedDataParallel": (
        "reduces gradients by its manager",
        "attach(bare model, optimizer, config, manager=manager)",
    ),
}
OPTIMIZERS = {  # name of a class of optimizers -> what it does by itself, and what to do
    "ZeroRedundancyOptimizer": (
        "steps a part of the parameters on each rank and broadcasts it at every step",
        "attach the optimizer class inside it, or shard with fully_shard or DeepSpeed's ZeRO",
    ),
    "OSS": (
        "steps a part of the parameters on each rank and broadcasts it at every step",
        "attach the optimizer inside it",
    ),
    "PostLocalSGDOptimizer": (
        "averages parameters by itself",
        "attach the optimizer inside it, and remove its averager",
    ),
    "DistributedOptimizer": ("steps parameters of other ranks", "attach an optimizer of this rank's parameters"),
    "DistributedFusedAdam": (
        "shards states over all its ranks",
        "attach torch.optim.AdamW, or use deslo_plugin.DesLoc",
    ),
    "DistributedFusedLAMB": (
        "shards states over all its ranks",
        "attach a local optimizer, or use deslo_plugin.DesLoc",
    ),
    "_NamedOptimizer": ("keeps its states by name", "attach the optimizer inside it"),
    "OptimizerWrapper": (
        "is committed by a torchft manager at every step",
        "attach(model, the optimizer inside it, config, manager=manager)",
    ),
}


def bare(model: nn.Module) -> nn.Module:
    """``model`` without DDP, DataParallel, torch.compile and Lightning Fabric around it, in whatever order."""
    while True:
        inside = model.__dict__.get("_modules", {})
        if "_orig_mod" in inside:
            model = inside["_orig_mod"]
        elif "_forward_module" in inside and "_original_module" in inside:
            model = inside["_original_module"]
        elif isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        else:
            return model


def bare_optimizer(optimizer: Any) -> Any:
    """The one that steps, inside wrappers that keep no state of their own: Accelerate's and Lightning's."""
    while isinstance(inside := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        shares = getattr(optimizer, "state", None) is inside.state and optimizer.param_groups is inside.param_groups
        if not shares and _names(optimizer).isdisjoint(
            {"AcceleratedOptimizer", "_FabricOptimizer", "LightningOptimizer"}
        ):
            break
        refuse_optimizer(optimizer)
        optimizer = inside
    return optimizer


def renew_captured_steps(optimizer: Any) -> None:
    """Wrappers around ``optimizer`` that kept the ``step`` which it had when they were made, to put it back after each
    of theirs, keep the one of now: Accelerate's does, beside a GradScaler."""
    while isinstance(inside := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        if hasattr(optimizer, "_optimizer_original_step_method"):
            optimizer.__setstate__({})  # what it does after a copy: captures the step again
        optimizer = inside


def reducers(model: nn.Module) -> list[DistributedDataParallel]:
    """Every DDP around, inside or among the modules of ``model``."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, of those that ``state_dict()`` would have, each once."""
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=True)
        if name not in module._non_persistent_buffers_set
    }


def refuse(model: Any, optimizer: Any) -> None:
    """Raises ``ConfigError`` for what would be averaged wrongly, or would go on to communicate at every step."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "attach(model)",
            "a torch.nn.Module",
            type(model).__name__,
            "pass the model itself; for several, call attach for each of them and its optimizer",
        )
    if any(model is engine or bare(model) is getattr(engine, "module", None) for engine in engines):
        raise _refused(
            "attach(model)", "DeepSpeedEngine or the module in it", "reduces gradients over all its ranks", JSON
        )
    for name, module in model.named_modules():
        _refuse_module(name, module)
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            raise _refused(
                f"attach(model) parameter {name}", "one of deepspeed.zero.Init", "is sharded by DeepSpeed", JSON
            )
        for kept in ("_in_backward_optimizers", "_overlapped_optimizer"):
            if getattr(param, kept, None):
                raise _refused(
                    f"attach(model) parameter {name}",
                    "one with its own optimizer",
                    "is stepped in the backward",
                    "remove _apply_optimizer_in_backward: averages need a step of their own",
                )
    refuse_optimizer(optimizer)


def refuse_optimizer(optimizer: Any) -> None:
    """The optimizer's half of ``refuse``."""
    for kind in type(optimizer).__mro__:
        if kind.__module__.startswith("deepspeed.runtime"):
            raise _refused(
                "attach(optimizer)", f"{type(optimizer).__name__} of DeepSpeed", "is stepped by its engine", JSON
            )
        if kind.__name__ in OPTIMIZERS:
            raise _refused("attach(optimizer)", kind.__name__, *OPTIMIZERS[kind.__name__])
    if hasattr(optimizer, "_allreduce_grad_async"):
        raise _refused(
            "attach(optimizer)",
            "Horovod's DistributedOptimizer",
            "reduces gradients over all ranks",
            "attach the optimizer inside it, under torch.distributed",
        )
    if not (
        callable(getattr(optimizer, "step", None))
        and hasattr(optimizer, "param_groups")
        and hasattr(optimizer, "state")
    ):
        raise ConfigError(
            "attach(optimizer)",
            "a torch.optim.Optimizer",
            type(optimizer).__name__,
            "pass one; for several, call attach for each of them",
        )


def refuse_across(model: nn.Module, topology: Topology) -> None:
    """Raises ``ConfigError`` for modules that communicate beyond this rank's replica at every forward."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            ranks = dist.get_process_group_ranks(module.process_group or dist.group.WORLD)
            if not set(ranks) <= set(topology.shard_group):
                size = topology.replica_size
                raise ConfigError(
                    f"attach(model) {name}",
                    "SyncBatchNorm over the ranks of one replica",
                    f"one over ranks {ranks}, which wait for each other at every forward",
                    "use BatchNorm: a replica is one rank, and statistics are averaged"
                    if size == 1
                    else "nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=group) with group, _ = "
                    f"torch.distributed.new_subgroups(group_size={size}), before the model is wrapped",
                )


def _refuse_module(name: str, module: nn.Module) -> None:
    where = f"attach(model) {name}" if name else "attach(model)"
    for kind in type(module).__mro__:
        if kind.__module__.startswith(("deepspeed.runtime", "deepspeed.moe")):
            raise _refused(where, kind.__name__, "communicates by DeepSpeed's groups", JSON)
        if kind.__name__ in MODULES and not isinstance(module, DistributedDataParallel):
            raise _refused(where, kind.__name__, *MODULES[kind.__name__])
    if "replicate" in _contracts(module):
        raise _refused(where, "a module of replicate()", *MODULES["ReplicateModule"])
    for key, value in _tensors_of(module):
        if "ShardedTensor" in _names(value):
            raise _refused(
                f"attach(model) {name + '.' * bool(name)}{key}",
                "ShardedTensor",
                "is cut over ranks",
                "make it a DTensor: torch.distributed.tensor.distribute_tensor(tensor, mesh, [Shard(0)])",
            )


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    yield from ((key, value) for key, value in vars(module).items() if isinstance(value, Tensor))


def _contracts(module: nn.Module) -> Sequence[str]:
    """What torch's composable APIs have made of ``module``."""
    made = [value for key, value in vars(module).items() if str(key).startswith("__composable_api_state_key")]
    return [each if isinstance(each, str) else each.__name__ for kinds in made for each in kinds]


def _names(value: Any) -> set[str]:
    return {kind.__name__ for kind in type(value).__mro__}


def _refused(where: str, what: str, does: str, do: str) -> ConfigError:
    return ConfigError(where, "one that neither shards nor communicates by itself", f"{what}, which {does}", do)
