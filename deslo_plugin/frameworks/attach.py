"""``attach``: one call that connects any torch optimizer to its replicas, under DDP, under FSDP2, or without a wrapper."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.agreement import agree
from deslo_plugin.averaging import Averaging
from deslo_plugin.collectives import Alone, Average, Groups, ReplicaAverage, gathered, make_groups
from deslo_plugin.config import Config, as_dict, load_config
from deslo_plugin.frameworks import ddp, fsdp, torchft
from deslo_plugin.frameworks.attachment import Attachment, attached
from deslo_plugin.frameworks.equality import agree_on_model, agree_on_optimizer, equal_replicas, say_placement
from deslo_plugin.frameworks.kinds import refuse_kinds
from deslo_plugin.frameworks.one_model import refuse_one_replica
from deslo_plugin.frameworks.telemetry import start_telemetry
from deslo_plugin.frameworks.warmup import GradientAveraging
from deslo_plugin.log import say
from deslo_plugin.optimizer import DesLoc
from deslo_plugin.plan import BYTES
from deslo_plugin.shards import local
from deslo_plugin.stock import Everyone, StockAveraging, schedule
from deslo_plugin.strict import ConfigError
from deslo_plugin.telemetry import SyncEvent
from deslo_plugin.topology import Topology, contiguous


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    mesh: DeviceMesh | None = None,
    replicate: str | None = None,
    process_group: dist.ProcessGroup | None = None,
    manager: Any = None,
    emit: Callable[[SyncEvent], object] | None = None,
) -> Attachment:
    """Makes ``optimizer.step()`` a step of DES-LOC or MT-DAO, and gradients stay inside a replica from now on.

    Call it on every rank, once model and optimizer are as they will train: after ``DDP(model)``, ``fully_shard(model)``
    or ``accelerator.prepare(...)``, before the first step. Where several optimizers step one model, once for each of them.

    Args:
        model: a ``DistributedDataParallel``, a model sharded by ``fully_shard``, or any other module, of which every
            rank then is one replica.
        optimizer: a ``DesLoc``, or any other optimizer whose states ``config`` schedules by ``deslo.sync_every``.
        config: both blocks as a dict or the path of a JSON or YAML file. For a DesLoc only where it has none of its own.
        mesh: the device mesh of all ranks, of which one dimension runs across replicas.
        replicate: the name of that dimension; "replicate" or "dp_replicate" by default.
        process_group: without ``mesh``, the ranks that average, each a replica of one rank; by default the world.
        manager: a ``torchft.Manager``, for replicas that may die and come back: every process that has one is a replica,
            and nothing else joins them. See ``frameworks.torchft``.
        emit: called with a ``SyncEvent`` after every average.

    Raises ``ConfigError`` for a setting that cannot work, on every rank and before anything is trained.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper keeps the one that steps
    if hasattr(optimizer, "deslo"):
        raise ConfigError("attach(optimizer)", "one call for each optimizer", "a second one", "remove it")
    if manager is not None:
        return _live(model, optimizer, _config_of(optimizer, config), manager, (mesh, replicate, process_group), emit)
    if not dist.is_initialized():
        refuse_kinds(model, optimizer)
        return _alone(model, optimizer, _config_of(optimizer, config), emit)
    config = _agreed_config(model, optimizer, config, mesh, process_group)
    topology = _topology_of(model, config, mesh, replicate, process_group)
    groups = make_groups(topology, config.deslo.timeout_s)
    agree_on_model(model, lambda p: p.shape, groups.world)
    refuse_kinds(model, optimizer)
    named = dict(model.named_parameters())
    equal_replicas({}, dict(zip(named, local(list(named.values())))), config.deslo.initial_params, groups)

    copies = _copies_of(model, groups)
    average = ReplicaAverage(groups, timeout_s=config.deslo.timeout_s, copies=copies)
    averaging = _averaging_of(optimizer, config, average, lambda value: list(gathered(value, groups.world).values()), emit)
    agree_on_optimizer(averaging, config, groups.world)
    if isinstance(model, DistributedDataParallel):
        ddp.refuse_join(model)
    buffers = [] if model in attached else _floating_buffers(model)
    if model not in attached and topology.replicas > 1:
        _keep_inside_replicas(model, buffers, averaging, groups)
    params = [local(group["params"]) for group in optimizer.param_groups]
    attachment = Attachment(
        averaging, groups, config,
        gradient_bytes=[_gradient_bytes(model, each, config, average.divisor) for each in params],
        buffer_bytes=sum(buffer.numel() for buffer in buffers) * BYTES[config.deslo.wire_dtype],
    )
    averaging.members.names = {param: name for name, param in named.items()}
    optimizer.deslo = attachment
    attached.setdefault(model, []).append(attachment)
    refuse_one_replica(attachment, optimizer, *([model, model.module] if isinstance(model, DistributedDataParallel) else [model]))
    say(attachment.plan.describe())
    say_placement(topology, groups.world)
    start_telemetry(attachment)
    return attachment


def _alone(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, emit: Any) -> Attachment:
    """A script started as one process without a launcher: the plain optimizer."""
    topology, average = contiguous(1, 0, 1), Alone()
    groups = Groups(topology, world=None, shard=None, replica=None, singleton=None)
    averaging = _averaging_of(optimizer, config, average, lambda value: [value], emit)
    optimizer.deslo = Attachment(averaging, groups, config)
    attached.setdefault(model, []).append(optimizer.deslo)
    say(optimizer.deslo.plan.describe())
    start_telemetry(optimizer.deslo)
    return optimizer.deslo


def _live(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, manager: Any, others: Sequence[Any], emit: Any
) -> Attachment:
    """A replica whose peers come and go: the transport is torchft's, and so is the way in which replicas become equal."""
    if any(other is not None for other in others):
        raise ConfigError("attach(manager=...)", "no mesh, replicate or process_group beside it", "one", "remove it")
    if model in attached:
        raise ConfigError("attach(manager=...)", "one optimizer for the model", "a second one", "give one all parameters")
    refuse_kinds(model, optimizer)
    average = torchft.live_average(manager, model, config)
    averaging = _averaging_of(optimizer, config, average, lambda value: [value], emit)
    buffers = _floating_buffers(model)
    if buffers:
        averaging.add_buffers(buffers, average)
    buffer_bytes = sum(buffer.numel() for buffer in buffers) * BYTES[config.deslo.wire_dtype]
    attachment = torchft.LiveAttachment(averaging, None, config, buffer_bytes=buffer_bytes)
    average.represent(torchft.Replica(model, averaging, config), greet=lambda: say(attachment.plan.describe()))
    optimizer.deslo, attached[model] = attachment, [attachment]
    return attachment


def _agreed_config(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: Any, mesh: DeviceMesh | None, group: dist.ProcessGroup | None
) -> Config:
    """The same config on every rank, or an error on every rank: a mistake of one must not leave the others waiting."""
    problem = ""
    try:
        config = _config_of(optimizer, config)
    except ConfigError as error:
        problem = error
    shape = None if mesh is None else mesh.mesh.tolist()
    mine = {"model": type(model).__name__, "optimizer": type(optimizer).__name__, "mesh": shape, "error": problem}
    agree("attach's", mine | ({} if problem else as_dict(config)), do="call attach alike on every rank", group=group)
    if problem:
        raise problem
    return config


def _config_of(optimizer: torch.optim.Optimizer, config: Any) -> Config:
    if isinstance(optimizer, DesLoc):
        if config is not None:
            raise ConfigError("attach(config=...)", "none beside a DesLoc, which has its own", "one", "give it to DesLoc")
        return optimizer.config
    if config is None:
        raise ConfigError("attach(config=...)", f"a config with deslo.sync_every for {type(optimizer).__name__}", "none",
                          "pass the file or dict, or use deslo_plugin.DesLoc")
    config = load_config(config)
    if config.deslo.sync_every is None:
        raise ConfigError("attach(optimizer)", "a DesLoc for a config without deslo.sync_every", type(optimizer).__name__,
                          "build DesLoc(params, config), or write the periods of this optimizer's states in deslo.sync_every")
    return config


def _topology_of(
    model: nn.Module, config: Config, mesh: DeviceMesh | None, replicate: str | None, process_group: dist.ProcessGroup | None
) -> Topology:
    size = config.deslo.replica_size
    if isinstance(model, DistributedDataParallel):
        topology = ddp.topology_of(model, config.deslo)
    elif fsdp.is_sharded(model):
        topology = fsdp.topology_of(model, mesh, replicate)
    elif mesh is not None:
        topology = fsdp.rows_of(mesh, replicate)
    else:
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        topology = Topology(tuple((rank,) for rank in ranks), dist.get_rank())
    if size not in ("auto", topology.replica_size):
        raise ConfigError("deslo.replica_size", f"{topology.replica_size}, as the model and its mesh have it", str(size),
                          "remove it, or wrap the model in DDP or FSDP2, which reduce gradients inside a replica")
    return topology


def _copies_of(model: nn.Module, groups: Groups) -> dist.ProcessGroup | None:
    if isinstance(model, DistributedDataParallel):
        return groups.shard
    return fsdp.copies_of(model) if fsdp.is_sharded(model) else None


def _averaging_of(
    optimizer: torch.optim.Optimizer, config: Config, average: Average, everyone: Everyone,
    emit: Callable[[SyncEvent], object] | None,
) -> Averaging:
    if isinstance(optimizer, DesLoc):
        optimizer.attach(average, list(chain.from_iterable(group["params"] for group in optimizer.param_groups)), emit)
        return optimizer.averaging
    averaging = StockAveraging(optimizer, config.deslo, average, everyone=everyone, emit=emit)
    schedule(averaging)
    return averaging


def _keep_inside_replicas(model: nn.Module, buffers: list[torch.Tensor], averaging: Averaging, groups: Groups) -> None:
    """Whatever wrapped the model reduces gradients inside replicas only; buffers follow the parameters' averages."""
    if buffers:
        everyone = replace(groups, replica=groups.world)
        average = ReplicaAverage(everyone, timeout_s=averaging.deslo.timeout_s, progress=averaging.average.progress)
        averaging.add_buffers(buffers, average)
    if isinstance(model, DistributedDataParallel):
        ddp.hook(model, averaging, groups)
    elif averaging.deslo.synchronous_steps:
        GradientAveraging(model, averaging)


def _gradient_bytes(model: nn.Module, params: Sequence[torch.Tensor], config: Config, divisor: int) -> int:
    """What a step of the warm-up sends: under DDP gradients as they are, else in wire dtype with a flag for each."""
    trained = [param for param in params if param.requires_grad]
    if isinstance(model, DistributedDataParallel):
        return sum(param.nbytes for param in trained)
    return -(-sum(param.numel() + 1 for param in trained) // divisor) * BYTES[config.deslo.wire_dtype]


def _floating_buffers(model: nn.Module) -> list[torch.Tensor]:
    """What would be saved and is no whole number: running statistics, not tables or counters."""
    saved = model.state_dict(keep_vars=True)
    return [buffer for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()]
