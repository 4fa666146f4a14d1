"""What happens to a DeepSpeed engine of ours: checked, built on replica groups, armed, and kept in step."""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters, utils as zero_utils

from deslo_plugin.agreement import agree
from deslo_plugin.clock import GROUP_STEP
from deslo_plugin.collectives import Groups, ReplicaAverage, gathered
from deslo_plugin.config import Config, DesloConfig, read_deslo
from deslo_plugin.frameworks.attachment import Attachment
from deslo_plugin.frameworks.deepspeed import checkpoint, zero
from deslo_plugin.frameworks.deepspeed.everyone import expect_ours, leave_note
from deslo_plugin.frameworks.deepspeed.groups import ReplicaUnit, active, groups_of
from deslo_plugin.frameworks.deepspeed.job import compared, is_ours, job_of, refuse_misspelt, refuse_unsupported
from deslo_plugin.frameworks.equality import agree_on_model, agree_on_optimizer, equal_replicas, say_placement
from deslo_plugin.frameworks.telemetry import add_scalars, start_telemetry
from deslo_plugin.frameworks.watch import Watch
from deslo_plugin.frameworks.wrappers import engines, saved_buffers
from deslo_plugin.log import say
from deslo_plugin.optimizer import DesLoc
from deslo_plugin.stock import StockAveraging
from deslo_plugin.strict import ConfigError
from deslo_plugin.sync import NonFiniteError
from deslo_plugin.versions import expect, release

TakeStep = Callable[[Any], None]
OUTSIDE = ("allreduce_gradients", "_take_model_step", "save_checkpoint", "load_checkpoint")  # ask for groups after init


ZERO_3_SINCE = (0, 19, 8)  # on CPUs, where the releases before it are not even equal to themselves
LAST_MICRO_BATCH_ALONE = (0, 17, 6), (0, 18, 3)  # from, and below: what its ZeRO-2 keeps of several that are accumulated
NOTHING_OF_US = (
    'deslo: deslo_plugin.run started this script, but its DeepSpeed config has no "deslo" block and no "DesLoc" optimizer: this '
    "engine trains as DeepSpeed alone; to average its optimizer's states instead of gradients, write their periods into deslo.sync_every"
)
expected = False  # whether the user has asked for us otherwise than by a config, so that one without us is a surprise


def install() -> None:
    """Teaches DeepSpeed the "DesLoc" optimizer and the "deslo" block. Runs once, after DeepSpeed's import."""
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
        ds = given["config"] if isinstance(given["config"], Mapping) else given["config_class"]._param_dict
        engines.add(self)
        ours = is_ours(ds, given["optimizer"])
        place = leave_note("deepspeed.initialize", ours) if ours or given["mpu"] is None else None
        if not ours:
            refuse_misspelt(ds)
            if expected:
                say(NOTHING_OF_US, logging.WARNING)
            return original(self, *args, **kwargs)
        expect_ours("deepspeed.initialize", place)
        expect("deepspeed")
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # as the engine will: NCCL needs it before it talks
        # first of all: what one rank alone would be refused for must not leave the others waiting
        agree("the DeepSpeed config's", compared(ds), do="give every rank the same config")
        kinds = {name: type(given.get(name)).__name__ for name in ("model", "optimizer", "mpu", "mesh_device")}
        agree("deepspeed.initialize's", kinds, do="give every rank the same")
        deslo, optimizer = job_of(ds, given["optimizer"])
        refuse_unsupported(ds, given["model"], given["mpu"], given.get("mesh_device"), deslo)
        groups = groups_of(deslo)
        _equal_replicas(given["model"], deslo, groups)
        unit = ReplicaUnit(groups)
        given |= {"optimizer": optimizer, "mpu": unit}
        if deslo.sync_every is None:
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
        if call.arguments.get("data_parallel_group") is None:
            if not dist.is_initialized():
                deepspeed.init_distributed()  # as DeepSpeed begins
            ds = {} if config is None else deepspeed.runtime.config.DeepSpeedConfig(config)._param_dict
            place = leave_note("deepspeed.zero.Init", "deslo" in ds)
            if "deslo" in ds:
                expect_ours("deepspeed.zero.Init", place)
                agree("deepspeed.zero.Init's", {"deslo": ds["deslo"]}, do="give every rank the same config")
                call.arguments["data_parallel_group"] = groups_of(read_deslo(ds["deslo"])).shard
        original(*call.args, **call.kwargs)

    return init


def _equal_replicas(model: Any, deslo: DesloConfig, groups: Groups) -> None:
    """Same names, shapes and values of all parameters on every rank, or an error; before anything could hang."""
    agree_on_model(model, lambda p: getattr(p, "ds_shape", p.shape))
    params = dict(model.named_parameters())
    sharded = {name: zero.own_part(p) for name, p in params.items() if hasattr(p, "ds_tensor")}
    for name, p in params.items():
        if name in sharded and dist.get_world_size(p.ds_process_group) != groups.topology.replica_size:
            raise ConfigError(f"parameter {name}", f"zero.Init over the {groups.topology.replica_size} ranks of a replica",
                              f"{dist.get_world_size(p.ds_process_group)} ranks",
                              "pass config_dict_or_path=<this DeepSpeed config> to deepspeed.zero.Init")
    whole = {name: p.data for name, p in params.items() if name not in sharded} | saved_buffers(model)
    # by way of the accelerator: the model may still be on the CPU, where NCCL does not reach
    equal_replicas(whole, sharded, deslo.initial_params, groups, lambda t: t.to(get_accelerator().current_device_name()))


def _attach(engine: DeepSpeedEngine, deslo: DesloConfig, groups: Groups, unit: ReplicaUnit) -> None:
    """Connects the built optimizer to the replica group and makes the engine keep its replicas in step."""
    _expect_whole_gradients(engine)
    optimizer = engine.basic_optimizer
    stock = not isinstance(optimizer, DesLoc)
    config = Config(optimizer=None, deslo=deslo) if stock else optimizer.config
    copies = None if engine.zero_optimization() else groups.shard
    average = ReplicaAverage(groups, timeout_s=deslo.timeout_s, copies=copies)
    zero.clear_padding(engine)
    partitions = list(zero.partitions(engine))
    if stock:
        of_engine = [{"params": params} for params in partitions]
        averaging = StockAveraging(
            optimizer, deslo, average, groups=of_engine, everyone=lambda value: list(gathered(value).values())
        )
    else:
        optimizer.attach(average, [param for params in partitions for param in params])
        averaging = optimizer.averaging
        # elsewhere DeepSpeed looks at the gradients itself, before it hands them over group by group
        averaging.skips_nonfinite &= engine.optimizer is optimizer
    agree_on_optimizer(averaging, config)
    numels = None
    if engine.zero_optimization_partition_weights():  # whose param groups are empty between steps
        numels = [sum(param.numel() for param in params) for params in partitions]
    stepped = {f"parameter {i} of param group {g}": param for g, params in enumerate(partitions) for i, param in enumerate(params)}
    watch = Watch(averaging, groups, stepped, [] if engine.zero_optimization() else stepped, in_engine=True)
    engine.deslo = Attachment(averaging, groups, config, numels, engine_steps=True, watch=watch)
    engine._take_model_step = (_averaged if stock else _kept_in_step)(engine, engine._take_model_step)
    if deslo.synchronous_steps:
        engine._take_model_step = _warmed_up(engine, engine._take_model_step)
    engine._take_model_step = _explained(engine, _recorded(engine, engine._take_model_step))
    checkpoint.save_the_truth(engine)
    for name in OUTSIDE:
        setattr(engine, name, _with_groups(unit, getattr(engine, name)))
    engine.deslo.announce()
    say_placement(groups.topology, groups.world)
    start_telemetry(engine.deslo)
    if engine.monitor.enabled and dist.get_rank() == 0:
        # its own scalars go by samples, and some of its writers take nothing that goes back
        add_scalars(engine.deslo, lambda scalars, _: engine.monitor.write_events(
            [(name, value, engine.global_samples) for name, value in scalars.items()]))


def _expect_whole_gradients(engine: DeepSpeedEngine) -> None:
    low, below = LAST_MICRO_BATCH_ALONE
    steps = engine.gradient_accumulation_steps()
    partitioned = engine.zero_optimization_stage() == 2 and not engine.optimizer.cpu_offload
    if low <= release("deepspeed") < below and partitioned and steps > 1:
        raise ConfigError("gradient_accumulation_steps", f"1 with ZeRO-2 of DeepSpeed {deepspeed.__version__}, which by itself "
                          "drops the gradients of all micro-batches but the last", str(steps),
                          "pip install 'deepspeed>=0.18.3,<0.20', or set zero_optimization.stage to 1")


def _with_groups(unit: ReplicaUnit, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with active(unit):
            return method(*args, **kwargs)

    return call


def _warmed_up(engine: DeepSpeedEngine, take_model_step: TakeStep) -> TakeStep:
    """While the synchronous warm-up lasts, a step begins with the mean of the replicas' gradients."""

    @functools.wraps(take_model_step)
    def step(lr_kwargs: Any) -> None:
        if engine.global_steps < engine.deslo.config.deslo.synchronous_steps:
            engine.deslo.averaging.average_gradients(engine.global_steps + 1, zero.gradients(engine))
        take_model_step(lr_kwargs)

    return step


def _recorded(engine: DeepSpeedEngine, take_model_step: TakeStep) -> TakeStep:
    """A step of the engine, which may be several of the optimizer, has ended."""

    @functools.wraps(take_model_step)
    def step(lr_kwargs: Any) -> None:
        take_model_step(lr_kwargs)
        if engine.deslo.averaging.watch:
            engine.deslo.watch.step_ended(of_engine=True)
        engine.deslo.recorder.step_ended()

    return step


def _explained(engine: DeepSpeedEngine, take_model_step: TakeStep) -> TakeStep:
    """NaN that DeepSpeed itself is known for is named as such: a lower rate would not help."""
    doubtful = engine.zero_optimization_partition_weights() and release("deepspeed") < ZERO_3_SINCE and engine.device.type == "cpu"

    @functools.wraps(take_model_step)
    def step(lr_kwargs: Any) -> None:
        try:
            take_model_step(lr_kwargs)
        except NonFiniteError as error:
            if doubtful:
                raise NonFiniteError(f"{error}; but first of all take DeepSpeed 0.19.8 or later: the ZeRO-3 of "
                                     f"{deepspeed.__version__} gives NaN on CPUs by itself, at any lr") from error
            raise

    return step


def _averaged(engine: DeepSpeedEngine, take_model_step: TakeStep) -> TakeStep:
    """A stock optimizer's step, whether DeepSpeed takes or skips it, as a step of Algorithm 1."""
    averaging = engine.deslo.averaging

    @functools.wraps(take_model_step)
    @torch.no_grad()
    def step(lr_kwargs: Any) -> None:
        def update(cohorts: Any) -> None:
            take_model_step(lr_kwargs)
            if not engine._step_applied:
                _skipped(engine, lr_kwargs)
            averaging.learn_states(engine._step_applied)

        for group in averaging.groups:
            group[GROUP_STEP] = engine.global_steps  # survives a resume
        averaging.around(update)
        if averaging.deslo.when == "after_update" or not engine._step_applied:
            zero.publish(engine)

    return step


def _kept_in_step(engine: DeepSpeedEngine, take_model_step: TakeStep) -> TakeStep:
    """A step that DeepSpeed skips on this replica alone (overflow, NaN) still ticks, averages and moves the lr."""

    @functools.wraps(take_model_step)
    @torch.no_grad()
    def step(lr_kwargs: Any) -> None:
        take_model_step(lr_kwargs)
        if engine._step_applied:
            return
        for _ in zero.stepwise(engine):
            engine.deslo.optimizer.skip_step()
        zero.publish(engine)
        _skipped(engine, lr_kwargs)

    return step


def _skipped(engine: DeepSpeedEngine, lr_kwargs: Any) -> None:
    """What a skipped step still does: it is counted and said, and moves the lr schedule."""
    attachment = engine.deslo
    attachment.meter.skipped_steps += 1
    say(f"deslo: step {engine.global_steps} skipped on replica {attachment.topology.replica} (gradient not finite); "
        "it keeps its state and averages with the others", logging.WARNING)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step(**(lr_kwargs or {}))
