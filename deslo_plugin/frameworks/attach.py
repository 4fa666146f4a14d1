"""``attach``: one call that connects any torch optimizer to its replicas, under DDP, under FSDP2, or without a
wrapper."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.attachment import Attachment, attached
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checkpoint.state_dict_guard import refuse_one_replica
from deslo_plugin.checks import module_wrappers as wrappers
from deslo_plugin.checks.replica_checks import (
    agree_on_model,
    agree_on_optimizer,
    broadcast_or_check_params,
    listed,
    refuse_parts,
    say_placement,
)
from deslo_plugin.checks.replica_watch import Watch
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank, make_groups, reachable
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.comm.transport import SingleReplica, Transport
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks import ddp, fsdp2, torchft
from deslo_plugin.frameworks.gradient_warmup import GradientAveraging
from deslo_plugin.frameworks.parameter_kinds import refuse_kinds, refuse_nonfinite
from deslo_plugin.frameworks.rehearsal import rehearse
from deslo_plugin.frameworks.requested import agreed, checked, refuse_together
from deslo_plugin.frameworks.telemetry_sinks import start_telemetry
from deslo_plugin.frameworks.which_replica import group_inside, refuse_across_replicas, topology_of
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.log import announce, log_rank0
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager, Everyone
from deslo_plugin.optim.any_optimizer_step import schedule
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.planning.plan import BYTES
from deslo_plugin.planning.transport_choice import choose_route, make_transport


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
        mesh: the device mesh of all ranks, of which one dimension runs across replicas.
        replicate: the name of that dimension; "replicate" or "dp_replicate" by default.
        process_group: without ``mesh``, the ranks that average, each a replica of one rank; by default the world.
        manager: a ``torchft.Manager``, for replicas that may die and come back: every process that has one is a
        replica,
            and nothing else joins them. See ``frameworks.torchft``.
        on_average: called with a ``SyncEvent`` after every average.

    Replicas that start unequal start from replica 0, which is said (``deslo.initial_params``). Raises ``ConfigError``
    for a setting that cannot work, and for what shards or communicates by itself, on every rank and before anything is
    changed."""
    if manager is not None:
        inner, config = checked(model, optimizer, config)
        attachment = _live(model, inner, config, manager, (mesh, replicate, process_group), on_average)
        wrappers.renew_captured_steps(optimizer)
        return attachment
    if not dist.is_initialized():
        inner, config = checked(model, optimizer, config)
        refuse_kinds(model, inner)
        attachment = _alone(model, inner, config, on_average)
        wrappers.renew_captured_steps(optimizer)
        return attachment
    given = optimizer
    optimizer, config = agreed(model, optimizer, config, mesh, process_group)
    around, model = model, wrappers.bare(model)
    ddps = wrappers.reducers(around)
    sharded = fsdp2.is_sharded(model)
    topology = topology_of(model, ddps, config, mesh, replicate, process_group)
    groups = make_groups(
        topology, config.deslo.timeout_s, on_cpu=_any_on_cpu(model, optimizer, process_group), within=process_group
    )
    refuse_together(lambda: refuse_across_replicas(around, ddps, topology, config, replicate), groups.world)
    agree_on_model(model, lambda p: p.shape, groups.world)
    refuse_kinds(model, optimizer)
    fsdp2.reshard(model)
    named = _params_of(model, optimizer)
    pieces = {name: param for name, param in named.items() if hasattr(param, "to_local")}
    plain = {name: param for name, param in named.items() if name not in pieces}
    if not ddps and config.deslo.initial_params != "broadcast":
        refuse_parts(plain, groups, fsdp2.forgotten(model) if sharded else ())
    whole = plain | wrappers.saved_buffers(model)
    broadcast_or_check_params(
        whole,
        dict(zip(pieces, local(list(pieces.values())))),
        config.deslo.initial_params,
        groups,
        lambda tensor: reachable(tensor, groups.world),
    )

    trained = {name: param for name, param in named.items() if param.requires_grad}
    refuse_together(lambda: refuse_nonfinite(trained), groups.world)
    first = model not in attached
    buffers = [buffer for buffer in _floating_buffers(model) if not any(buffer is each for each in _averaged_buffers())]
    if sharded:
        fsdp2.keep_inside_replicas(model, replicate)
    groups = replace(groups, shard=group_inside(model, ddps, groups))
    copies = groups.shard if ddps else fsdp2.copies_of(model) if sharded else None
    way = choose_route(config.deslo, groups, trained.values())
    average = make_transport(way, groups, config.deslo, copies)
    averaging = _averaging_of(
        optimizer, config, average, lambda value: list(all_gather_by_rank(value, groups.world).values()), on_average
    )
    wrappers.renew_captured_steps(given)
    agree_on_optimizer(averaging, config, groups.world)
    for each in ddps:
        ddp.refuse_join(each)
    if topology.replicas > 1:
        _keep_inside_replicas(model, ddps, first, buffers, averaging, groups)
    fsdp2.reshard_at_steps(model, averaging)
    params = [local(group["params"]) for group in optimizer.param_groups]
    attachment = Attachment(
        averaging,
        groups,
        config,
        gradient_bytes=[_gradient_bytes(ddps, each, config, average.divisor) for each in params],
        buffer_bytes=sum(buffer.numel() for buffer in buffers) * BYTES[config.deslo.wire_dtype],
        watch=Watch(averaging, groups, named, plain, names_left_out=first),
        route=way,
    )
    averaging.members.names = {param: name for name, param in named.items()}
    optimizer.deslo = attachment
    attached.setdefault(model, []).append(attachment)
    refuse_one_replica(attachment, optimizer, around)
    rehearse(attachment, [param for of_group in params for param in of_group])
    attachment.announce()
    say_placement(topology, groups.world)
    if sharded and topology.replica_size > 1 and (beside := fsdp2.not_sharded(model)):
        log_rank0(
            f"deslo: {listed(beside)} are trained and not sharded: nothing reduces their gradients inside a replica, "
            "whose ranks go apart; call fully_shard on the whole model too, or reduce those gradients yourself",
            logging.WARNING,
        )
    start_telemetry(attachment)
    return attachment


def _alone(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, on_average: Any) -> Attachment:
    """A script started as one process without a launcher: the plain optimizer."""
    topology, average = contiguous(1, 0, 1), SingleReplica()
    groups = Groups(topology, world=None, shard=None, replica=None, singleton=None)
    averaging = _averaging_of(optimizer, config, average, lambda value: [value], on_average)
    optimizer.deslo = Attachment(
        averaging, groups, config, watch=Watch(averaging, groups, _params_of(model, optimizer))
    )
    attached.setdefault(wrappers.bare(model), []).append(optimizer.deslo)
    optimizer.deslo.announce()
    start_telemetry(optimizer.deslo)
    return optimizer.deslo


def _live(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    manager: Any,
    others: Sequence[Any],
    on_average: Any,
) -> Attachment:
    """A replica whose peers come and go: the transport is torchft's, and so is the way in which replicas become
    equal."""
    if any(other is not None for other in others):
        raise ConfigError("attach(manager=...)", "no mesh, replicate or process_group beside it", "one", "remove it")
    inside = wrappers.bare(model)
    if inside in attached:
        raise ConfigError(
            "attach(manager=...)", "one optimizer for the model", "a second one", "give one all parameters"
        )
    refuse_kinds(model, optimizer)
    average = torchft.live_average(manager, model, config)
    averaging = _averaging_of(optimizer, config, average, lambda value: [value], on_average)
    buffers = _floating_buffers(model)
    if buffers:
        averaging.add_buffers(buffers, average)
    buffer_bytes = sum(buffer.numel() for buffer in buffers) * BYTES[config.deslo.wire_dtype]
    attachment = torchft.LiveAttachment(averaging, None, config, buffer_bytes=buffer_bytes)
    average.represent(torchft.Replica(model, averaging, config), greet=lambda: announce(attachment.plan.describe()))
    optimizer.deslo, attached[inside] = attachment, [attachment]
    return attachment


def _params_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Of the model, and what else the optimizer steps, such as those of a loss."""
    named = dict(model.named_parameters())
    known = set(map(id, named.values()))
    others = (
        (f"{index} of param group {number}", param)
        for number, group in enumerate(optimizer.param_groups)
        for index, param in enumerate(group["params"])
    )
    return named | {name: param for name, param in others if id(param) not in known}


def _any_on_cpu(model: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None) -> bool:
    """Whether averages carry tensors on the CPU, on any rank. Collective."""
    tensors = [*_params_of(model, optimizer).values(), *wrappers.saved_buffers(model).values()]
    return any(all_gather_by_rank(any(each.device.type == "cpu" for each in tensors), group).values())


def _averaged_buffers() -> Iterator[Tensor]:
    """Of every model in this process: modules that hold each other are attached one by one."""
    yield from (buffer for each in attached.values() for attachment in each for buffer in attachment.averaging.buffers)


def _averaging_of(
    optimizer: torch.optim.Optimizer,
    config: Config,
    average: Transport,
    everyone: Everyone,
    on_average: Callable[[SyncEvent], object] | None,
) -> StateAverager:
    if isinstance(optimizer, DesLoc):
        optimizer.attach(
            average, list(chain.from_iterable(group["params"] for group in optimizer.param_groups)), on_average
        )
        return optimizer.averaging
    averaging = AnyOptimizerAverager(optimizer, config.deslo, average, everyone=everyone, on_average=on_average)
    schedule(averaging)
    return averaging


def _keep_inside_replicas(
    model: nn.Module,
    ddps: Sequence[DistributedDataParallel],
    first: bool,
    buffers: list[Tensor],
    averaging: StateAverager,
    groups: Groups,
) -> None:
    """Whatever wrapped the model reduces gradients inside replicas only; buffers follow the parameters' averages."""
    if buffers:
        everyone = replace(groups, replica=groups.world)
        average = type(averaging.transport)(  # the way of the parameters
            everyone, timeout_s=averaging.deslo.timeout_s, progress=averaging.transport.progress
        )
        averaging.add_buffers(buffers, average)
    for each in ddps:
        ddp.hook(each, averaging, groups)
    if first and not ddps and averaging.deslo.synchronous_steps:
        GradientAveraging(model, averaging)


def _gradient_bytes(
    ddps: Sequence[DistributedDataParallel], params: Sequence[Tensor], config: Config, divisor: int
) -> int:
    """What a step of the warm-up sends: under DDP gradients as they are, else in wire dtype with a flag for each."""
    trained = [param for param in params if param.requires_grad]
    if ddps:
        return sum(param.nbytes for param in trained)
    return -(-sum(param.numel() + 1 for param in trained) // divisor) * BYTES[config.deslo.wire_dtype]


def _floating_buffers(model: nn.Module) -> list[Tensor]:
    """What would be saved and is no whole number: running statistics, not tables or counters."""
    return [buffer for buffer in wrappers.saved_buffers(model).values() if buffer.is_floating_point()]
