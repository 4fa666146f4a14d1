"""What happens to a DeepSpeed engine of ours: checked, built on replica groups, armed, and kept in step."""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero import utils as zero_utils
from torch import Tensor

from deslo_plugin.attachment import Attachment, register
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checks.module_wrappers import engines, saved_buffers
from deslo_plugin.checks.replica_checks import agree_on_model, broadcast_or_check_params
from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.comm.process_groups import Groups
from deslo_plugin.comm.transport import Transport
from deslo_plugin.config.load import read_deslo
from deslo_plugin.config.schema import Config, DesloConfig
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.base import Framework, build_attachment
from deslo_plugin.frameworks.deepspeed import checkpoint, zero
from deslo_plugin.frameworks.deepspeed.all_ranks import expect_ours, leave_note
from deslo_plugin.frameworks.deepspeed.config import (
    is_ours,
    job_of,
    refuse_misspelt,
    refuse_unsupported,
    settings_to_compare,
)
from deslo_plugin.frameworks.deepspeed.engine_step import EngineStep
from deslo_plugin.frameworks.deepspeed.matrices import whole_matrices
from deslo_plugin.frameworks.deepspeed.mpu import ReplicaMPU, groups_of, use_mpu
from deslo_plugin.frameworks.deepspeed.parallelism import AUTOTP_STATES, leave_sequence, unit_of
from deslo_plugin.frameworks.deepspeed.state_tree import EngineState
from deslo_plugin.frameworks.deepspeed.synchronisation import let_averages_travel
from deslo_plugin.frameworks.deepspeed.tensor_parts import refuse_unknown_cuts
from deslo_plugin.frameworks.parameter_kinds import refuse_nonfinite
from deslo_plugin.frameworks.requested import refuse_together
from deslo_plugin.frameworks.telemetry_sinks import add_scalars
from deslo_plugin.frameworks.versions import expect, release
from deslo_plugin.log import log_rank0
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.planning.route import Route
from deslo_plugin.planning.transport_choice import choose_route, make_transport

OUTSIDE = ("allreduce_gradients", "_take_model_step", "save_checkpoint", "load_checkpoint")  # ask for groups after init


# from, and below: what its ZeRO-2 keeps of several that are accumulated
LAST_MICRO_BATCH_ALONE = (0, 17, 6), (0, 18, 3)
NOTHING_OF_US = (
    'deslo: deslo_plugin.run started this script, but its DeepSpeed config has no "deslo" block and no "DesLoc" '
    "optimizer: this engine trains as DeepSpeed alone; to average its optimizer's states instead of gradients, write "
    "their periods into deslo.sync_every"
)
expected = False  # whether the user has asked for us otherwise than by a config, so that one without us is a surprise


def install() -> None:
    """Teaches DeepSpeed the "DesLoc" optimizer and the "deslo" block. Runs once, after DeepSpeed's import."""
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(DesLoc)
    DeepSpeedEngine.__init__ = _engine_init(DeepSpeedEngine.__init__)
    if hasattr(DeepSpeedEngine, AUTOTP_STATES):  # else it knows no AutoTP in training
        setattr(DeepSpeedEngine, AUTOTP_STATES, _tensor_parallel_states(getattr(DeepSpeedEngine, AUTOTP_STATES)))
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
                log_rank0(NOTHING_OF_US, logging.WARNING)
            return original(self, *args, **kwargs)
        expect_ours("deepspeed.initialize", place)
        expect("deepspeed")
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # as the engine will: NCCL needs it before it talks
        # first of all: what one rank alone would be refused for must not leave the others waiting
        check_same_on_all_ranks("the DeepSpeed config's", settings_to_compare(ds), do="give every rank the same config")
        kinds = {name: type(given.get(name)).__name__ for name in ("model", "optimizer", "mpu", "mesh_device")}
        check_same_on_all_ranks("deepspeed.initialize's", kinds, do="give every rank the same")
        deslo, optimizer = job_of(ds, given["optimizer"])
        refuse_unsupported(ds, given["model"], deslo)
        groups, mpu, mesh = groups_of(deslo, ds), given["mpu"], given.get("mesh_device")
        unit = unit_of(ds, mpu, mesh, groups)
        _equal_replicas(given["model"], deslo, groups, unit)
        given |= {"optimizer": optimizer, "mpu": unit} | ({} if mesh is None else {"mesh_device": None})
        if deslo.sync_every is None:
            given["config_class"].zero_force_ds_cpu_optimizer = False  # DesLoc is the CPU optimizer of this offload
        with use_mpu(unit):
            original(*call.args, **call.kwargs)
        leave_sequence(mpu, mesh)
        _attach(self, deslo, unit)

    return init


def _tensor_parallel_states(original: Callable[[DeepSpeedEngine, Any], None]) -> Callable[..., None]:
    """AutoTP puts DeepSpeed's own groups, which run across replicas, in the place of an engine's mpu."""

    @functools.wraps(original)
    def configure(self: DeepSpeedEngine, model: Any) -> None:
        unit = self.mpu
        original(self, model)
        if isinstance(unit, ReplicaMPU):
            self.mpu = unit

    return configure


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
                check_same_on_all_ranks(
                    "deepspeed.zero.Init's", {"deslo": ds["deslo"]}, do="give every rank the same config"
                )
                call.arguments["data_parallel_group"] = groups_of(read_deslo(ds["deslo"]), ds).shard
        original(*call.args, **call.kwargs)

    return init


def _equal_replicas(model: Any, deslo: DesloConfig, groups: Groups, unit: ReplicaMPU) -> None:
    """Same names, shapes and values of all parameters on every rank, or an error; before anything could hang."""
    agree_on_model(model, lambda p: getattr(p, "ds_shape", p.shape))
    params = dict(model.named_parameters())
    sharded = {name: zero.local_shard(p) for name, p in params.items() if hasattr(p, "ds_tensor")}
    for name, p in params.items():
        if name in sharded and dist.get_world_size(p.ds_process_group) != groups.topology.replica_size:
            raise ConfigError(
                f"parameter {name}",
                f"zero.Init over the {groups.topology.replica_size} ranks of a replica",
                f"{dist.get_world_size(p.ds_process_group)} ranks",
                "pass config_dict_or_path=<this DeepSpeed config> to deepspeed.zero.Init",
            )
        if name in sharded and unit.tensor is not None:
            raise ConfigError(
                f"parameter {name}",
                "a model that is built whole, which AutoTP cuts",
                "one of zero.Init, over all ranks of a replica",
                "build it without deepspeed.zero.Init",
            )
    whole = {name: p.data for name, p in params.items() if name not in sharded} | saved_buffers(model)
    # by way of the accelerator: the model may still be on the CPU, where NCCL does not reach
    broadcast_or_check_params(
        whole, sharded, deslo.initial_params, groups, lambda t: t.to(get_accelerator().current_device_name())
    )
    trained = {name: sharded.get(name, p.data) for name, p in params.items() if p.requires_grad}
    refuse_together(lambda: refuse_nonfinite(trained), groups.world)


class DeepSpeed(Framework):
    """The seam to an engine that was built on the groups of ``unit``."""

    state_adapter, engine_steps = EngineState, True

    def __init__(self, engine: DeepSpeedEngine, deslo: DesloConfig, unit: ReplicaMPU):
        _expect_whole_gradients(engine)
        refuse_unknown_cuts(engine)
        self.engine, self.unit, self.optimizer = engine, unit, engine.basic_optimizer
        ours = isinstance(self.optimizer, DesLoc)
        self.config = self.optimizer.config if ours else Config(optimizer=None, deslo=deslo)
        if ours:
            self.optimizer.whole = whole_matrices(engine, self.config.desloc.rule)
        zero.zero_padding(engine)
        self.param_groups = [{"params": params} for params in zero.partitions(engine)]
        self._named = {
            f"parameter {i} of param group {g}": param
            for g, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
        }
        self.alike = () if engine.zero_optimization() or unit.tensor is not None else self._named

    @property
    def named(self) -> Mapping[str, Tensor]:
        return self._named

    @property
    def fixed_numels(self) -> list[int] | None:
        if not self.engine.zero_optimization_partition_weights():
            return None  # else param groups are empty between steps
        return [sum(param.numel() for param in group["params"]) for group in self.param_groups]

    def groups(self) -> Groups:
        return self.unit.groups

    def transport(self, groups: Groups) -> tuple[Transport, Route]:
        route = choose_route(self.config.deslo, groups, self.named.values())
        copies = None if self.engine.zero_optimization() else self.unit.data
        return make_transport(route, groups, self.config.deslo, copies), route

    def keep_gradients_inside(self, averaging: StateAverager, groups: Groups) -> None:
        """The ``mpu`` does. Elsewhere DeepSpeed looks for NaN itself, before it hands gradients over group by group."""
        if isinstance(self.optimizer, DesLoc):
            averaging.gradients.skips_nonfinite &= self.engine.optimizer is self.optimizer

    def install(self, attachment: Attachment) -> None:
        engine = self.engine
        register(attachment, engine)
        engine._take_model_step = EngineStep(engine, engine._take_model_step)
        let_averages_travel(engine)
        checkpoint.install_checkpoint_methods(engine)
        for name in OUTSIDE:
            setattr(engine, name, _with_groups(self.unit, getattr(engine, name)))


def _attach(engine: DeepSpeedEngine, deslo: DesloConfig, unit: ReplicaMPU) -> None:
    """Connects the built optimizer to the replica group and makes the engine keep its replicas in step."""
    attachment = build_attachment(DeepSpeed(engine, deslo, unit))
    if engine.monitor.enabled and dist.get_rank() == 0:
        # its own scalars go by samples, and some of its writers take nothing that goes back
        add_scalars(
            attachment,
            lambda scalars, _: engine.monitor.write_events(
                [(name, value, engine.global_samples) for name, value in scalars.items()]
            ),
        )


def _expect_whole_gradients(engine: DeepSpeedEngine) -> None:
    low, below = LAST_MICRO_BATCH_ALONE
    steps = engine.gradient_accumulation_steps()
    partitioned = engine.zero_optimization_stage() == 2 and not engine.optimizer.cpu_offload
    if low <= release("deepspeed") < below and partitioned and steps > 1:
        raise ConfigError(
            "gradient_accumulation_steps",
            f"1 with ZeRO-2 of DeepSpeed {deepspeed.__version__}, which by itself "
            "drops the gradients of all micro-batches but the last",
            str(steps),
            "pip install 'deepspeed>=0.18.3,<0.20', or set zero_optimization.stage to 1",
        )


def _with_groups(unit: ReplicaMPU, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with use_mpu(unit):
            return method(*args, **kwargs)

    return call
