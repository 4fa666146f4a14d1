"""``attach``: one call that connects any torch optimizer to its replicas, under DDP, under FSDP2, or without a
wrapper."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from deslo_plugin.attachment import Attachment
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.checkpoint.resharding import is_sharded
from deslo_plugin.checks import module_wrappers as wrappers
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.base import Framework, build_attachment
from deslo_plugin.frameworks.ddp import DDP
from deslo_plugin.frameworks.fsdp2 import FSDP2
from deslo_plugin.frameworks.plain import Alone, Plain
from deslo_plugin.frameworks.requested import agreed, checked
from deslo_plugin.frameworks.torchft import TorchFT


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    mesh: DeviceMesh | None = None,
    replicate: str | None = None,
    process_group: dist.ProcessGroup | None = None,
    manager: Any = None,
    on_average: Callable[[SyncEvent], object] | None = None,
) -> Attachment:
    """Makes ``optimizer.step()`` a step of DES-LOC or MT-DAO, and gradients stay inside a replica from now on.

    Call it on every rank, once model and optimizer are as they will train: after ``DDP(model)``, ``fully_shard(model)``
    or ``accelerator.prepare(...)``, before the first step. Where several optimizers step one model, once for each of
    them.

    Args:
        model: a ``DistributedDataParallel``, a model sharded by ``fully_shard``, or any other module, of which every
            rank then is one replica; compiled or not, with DDP around it or among its modules.
        optimizer: a ``DesLoc``, or any other optimizer whose states ``config`` schedules by ``deslo.sync_every``.
        config: both blocks as a dict or the path of a JSON or YAML file. For a DesLoc only where it has none of its
        own.
        mesh: the device mesh of all ranks, of which one dimension runs across replicas. The ranks of a replica may hold
            different parts of the model then, under names of their own: stages of a pipeline, experts.
        replicate: the name of that dimension; "replicate" or "dp_replicate" by default.
        process_group: without ``mesh``, the ranks that average, each a replica of one rank; by default the world.
        manager: this rank's ``torchft.Manager``, for replicas that may die and come back: the world of this process is
            one replica then, and nothing else joins it with others. See ``frameworks.torchft``.
        on_average: called with a ``SyncEvent`` after every average.

    Replicas that start unequal start from replica 0, which is said (``deslo.initial_params``). Raises ``ConfigError``
    for a setting that cannot work, and for what shards or communicates by itself, on every rank and before anything is
    changed."""
    where = mesh, replicate, process_group
    framework: Framework
    if manager is not None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            inner, config, _ = agreed(model, optimizer, config, mesh, process_group, _wrapper_of)
        else:
            inner, config = checked(model, optimizer, config)
        framework = TorchFT(model, inner, config, manager, where)
    elif not dist.is_initialized():
        framework = Alone(model, *checked(model, optimizer, config))
    else:
        inner, config, wrapper = agreed(model, optimizer, config, mesh, process_group, _wrapper_of)
        framework = wrapper(model, inner, config, *where)
    attachment = build_attachment(framework, on_average)
    wrappers.renew_captured_steps(optimizer)
    return attachment


def _wrapper_of(model: nn.Module) -> type[Plain]:
    """What reduces the gradients of ``model``: the one place that looks."""
    sharded, reduced = is_sharded(wrappers.bare(model)), bool(wrappers.reducers(model))
    if sharded and reduced:
        raise ConfigError(
            "attach(model)", "DDP or fully_shard", "both", "remove DDP: fully_shard reduces gradients in a replica"
        )
    return FSDP2 if sharded else DDP if reduced else Plain
