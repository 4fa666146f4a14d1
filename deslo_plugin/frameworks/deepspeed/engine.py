"""What happens to a DeepSpeed engine of ours: checked, built on replica groups, armed, and kept in step."""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters, utils as zero_utils
from torch import Tensor

from deslo_plugin.agreement import agree, digests
from deslo_plugin.collectives import Groups, ReplicaAverage
from deslo_plugin.config import DesloConfig, as_dict, read_deslo
from deslo_plugin.frameworks.deepspeed import checkpoint, zero
from deslo_plugin.frameworks.deepspeed.groups import ReplicaUnit, active, groups_of
from deslo_plugin.frameworks.deepspeed.job import compared, job_of, refuse_unsupported
from deslo_plugin.log import say
from deslo_plugin.optimizer import DesLoc
from deslo_plugin.plan import Plan, make_plan
from deslo_plugin.strict import ConfigError
from deslo_plugin.telemetry import Meter
from deslo_plugin.topology import Topology

TESTED = "0.19."
OUTSIDE = ("allreduce_gradients", "_take_model_step", "save_checkpoint", "load_checkpoint")  # ask for groups after init


@dataclass(frozen=True)
class Attachment:
    """``engine.deslo``: what this engine's replicas do."""

    optimizer: DesLoc
    plan: Plan
    groups: Groups

    @property
    def topology(self) -> Topology:
        return self.groups.topology

    @property
    def meter(self) -> Meter:
        return self.optimizer.meter


def install() -> None:
    """Teaches DeepSpeed the "DesLoc" optimizer and the "deslo" block. Runs once, after DeepSpeed's import."""
    if not deepspeed.__version__.startswith(TESTED):
        say(f"deslo: DeepSpeed {deepspeed.__version__} is not a version this was tested with ({TESTED}x)", logging.WARNING)
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(DesLoc)
    DeepSpeedEngine.__init__ = _engine_init(DeepSpeedEngine.__init__)
    partition_parameters.Init.__init__ = _zero_init(partition_parameters.Init.__init__)


def _engine_init(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # as the engine will: NCCL needs it before it talks
        ds = given["config"] if isinstance(given["config"], Mapping) else given["config_class"]._param_dict
        if given["mpu"] is None:  # first of all: what one rank alone would be refused for must not leave the others waiting
            agree("the DeepSpeed config's", compared(ds, given["optimizer"]), do="give every rank the same config")
        job = job_of(ds, given["optimizer"])
        if job is None:
            return original(self, *args, **kwargs)
        deslo, optimizer = job
        refuse_unsupported(ds, given["model"], given["mpu"], deslo)
        groups = groups_of(deslo)
        _equal_replicas(given["model"], deslo, groups)
        unit = ReplicaUnit(groups)
        given |= {"optimizer": optimizer, "mpu": unit}
        given["config_class"].zero_force_ds_cpu_optimizer = False  # DesLoc is the CPU optimizer of this offload
        with active(unit):
            original(*call.args, **call.kwargs)
        _attach(self, deslo, groups, unit)

    return init


def _zero_init(original: Callable[..., None]) -> Callable[..., None]:
    """``zero.Init`` with our config shards over one replica instead of the world."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        config = call.arguments.get("config_dict_or_path") or call.arguments.get("config")
        if config is not None and call.arguments.get("data_parallel_group") is None:
            ds = deepspeed.runtime.config.DeepSpeedConfig(config)._param_dict
            if "deslo" in ds:
                deepspeed.init_distributed()
                call.arguments["data_parallel_group"] = groups_of(read_deslo(ds["deslo"])).shard
        original(*call.args, **call.kwargs)

    return init


def _equal_replicas(model: Any, deslo: DesloConfig, groups: Groups) -> None:
    """Same names, shapes and values of all parameters on every rank, or an error; before anything could hang."""
    params = dict(model.named_parameters())
    shapes = {
        name: f"{tuple(getattr(p, 'ds_shape', p.shape))} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for name, p in params.items()
    }
    agree("model parameter", shapes, do="build the same model on every rank")
    sharded = {name: zero.own_part(p) for name, p in params.items() if hasattr(p, "ds_tensor")}
    for name, p in params.items():
        if name in sharded and dist.get_world_size(p.ds_process_group) != groups.topology.replica_size:
            raise ConfigError(f"parameter {name}", f"zero.Init over the {groups.topology.replica_size} ranks of a replica",
                              f"{dist.get_world_size(p.ds_process_group)} ranks",
                              "pass config_dict_or_path=<this DeepSpeed config> to deepspeed.zero.Init")
    whole = {name: p.data for name, p in params.items() if name not in sharded}
    if deslo.initial_params == "broadcast":
        for tensor in whole.values():
            _broadcast(tensor, 0, dist.group.WORLD)
        for tensor in sharded.values():
            _broadcast(tensor, groups.topology.shard, groups.replica)
    do = 'seed every rank alike, or set "deslo": {"initial_params": "broadcast"} to start from replica 0'
    agree("initial value of parameter", digests(whole.items()), do=do)
    agree("initial value of parameter", digests(sharded.items()), do=do, among=groups.topology.columns)


def _broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
    """In place, by way of the accelerator: the model may still be on the CPU, where NCCL does not reach."""
    staged = tensor.to(get_accelerator().current_device_name())
    dist.broadcast(staged, src=source, group=group)
    tensor.copy_(staged)


def _attach(engine: DeepSpeedEngine, deslo: DesloConfig, groups: Groups, unit: ReplicaUnit) -> None:
    """Connects the built optimizer to the replica group and makes the engine keep its replicas in step."""
    optimizer, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    groups_as_dict = {
        f"param group {index}.{key}": group[key]
        for index, group in enumerate(optimizer.param_groups) for key in ("lr", "weight_decay", "sync_every")
    }
    agree("optimizer", as_dict(optimizer.config) | groups_as_dict, do="build the same optimizer on every rank")
    average = ReplicaAverage(groups, timeout_s=deslo.timeout_s, copies=groups.shard if stage == 0 else None)
    zero.clear_padding(engine)
    partitions = list(zero.partitions(engine))
    optimizer.attach(average, [param for params in partitions for param in params])
    # elsewhere DeepSpeed looks at the gradients itself, before it hands them over group by group
    optimizer.averaging.skips_nonfinite &= engine.optimizer is optimizer
    plan = make_plan(
        optimizer.config,
        [sum(param.numel() for param in params) for params in partitions],
        [group["sync_every"] for group in optimizer.param_groups],
        groups.topology,
        average.divisor,
    )
    engine.deslo = Attachment(optimizer, plan, groups)
    engine._take_model_step = _kept_in_step(engine, engine._take_model_step)
    checkpoint.keep_replicas_apart(engine)
    for name in OUTSIDE:
        setattr(engine, name, _with_groups(unit, getattr(engine, name)))
    say(plan.describe())


def _with_groups(unit: ReplicaUnit, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with active(unit):
            return method(*args, **kwargs)

    return call


def _kept_in_step(engine: DeepSpeedEngine, take_model_step: Callable[[Any], None]) -> Callable[[Any], None]:
    """A step that DeepSpeed skips on this replica alone (overflow, NaN) still ticks, averages and moves the lr."""

    @functools.wraps(take_model_step)
    def step(lr_kwargs: Any) -> None:
        take_model_step(lr_kwargs)
        if engine._step_applied:
            return
        attachment = engine.deslo
        attachment.meter.skipped_steps += 1
        say(f"deslo: step {engine.global_steps} skipped on replica {attachment.topology.replica} (gradient not finite); "
            "it keeps its state and averages with the others", logging.WARNING)
        for _ in zero.stepwise(engine):
            attachment.optimizer.skip_step()
        zero.publish(engine)
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.step(**(lr_kwargs or {}))

    return step
