"""An engine's model and optimizer as the tree that every framework shares: each rank's range of each parameter,
live."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.checkpoint.model_names import places, plain_name, saved_buffers
from deslo_plugin.checkpoint.tensor_chunks import TensorChunks, of_range
from deslo_plugin.checkpoint.tree_agreement import States, Tree, fresh_states
from deslo_plugin.checks.module_wrappers import bare
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.deepspeed.tensor_parts import Part, part_of, shape_here
from deslo_plugin.frameworks.deepspeed.zero import copy_masters_to_model, local_shard, low_precision_pairs, shard_start
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager

SCALES = (bool, int, float)  # a loss scaler's numbers; what else it has is its configuration's
COUNTS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


class Range(NamedTuple):
    """``numel`` elements of a parameter from ``start`` on, which lie in ``flat`` from ``at`` on."""

    flat: Tensor
    at: int
    start: int
    numel: int

    def of(self, flat: Tensor, param: Any, part: Part) -> TensorChunks:
        return part.of(of_range(flat.view(-1).narrow(0, self.at, self.numel), self.start, shape_here(param)))


class EngineState:
    """Of any ZeRO stage; what is loaded is loaded into the partitions, and published into the model."""

    def __init__(self, engine: DeepSpeedEngine, _: object):
        self.engine, self.optimizer = engine, engine.basic_optimizer
        self.params = {plain_name(name): param for name, param in bare(engine.module).named_parameters()}
        self.parts = {name: part_of(param, engine.mpu.get_model_parallel_rank()) for name, param in self.params.items()}
        self.shapes = {name: part.shape for name, part in self.parts.items()}
        self.ranges = dict(self._ranges())

    @property
    def states(self) -> States:
        of_stepped = {id(range.flat): self.optimizer.state.get(range.flat, {}) for range in self.ranges.values()}
        own: dict[str, dict[str, Sequence[int] | None]] = {
            name: {PARAMS: list(self.shapes[name])}
            | {state: self._shape(name, value) for state, value in of_stepped[id(range.flat)].items()}
            for name, range in self.ranges.items()
        }
        # each rank has ranges of some parameters only
        everyone = all_gather_by_rank(own, self.engine.deslo.groups.shard)
        frozen = {name: {PARAMS: list(shape)} for name, shape in self.shapes.items()}
        return frozen | {name: states for each in everyone.values() for name, states in each.items()}

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        return self.optimizer.param_groups

    def prepare(self, saved: States) -> None:
        for name, range in self.ranges.items():
            if not self.optimizer.state.get(range.flat):
                self.optimizer.state[range.flat].update(
                    fresh_states(saved.get(name, {}), range.flat, self.shapes[name])
                )

    def forget(self, names: Sequence[str]) -> None:
        for name in names:
            state, param = name.split("/", 1)
            self.optimizer.state[self.ranges[param].flat].pop(state, None)

    def tree(self) -> Tree:
        tree: Tree = {f"buffers/{name}": buffer for name, buffer in saved_buffers(self.engine.module).items()}
        for name, param in self.params.items():
            range, part = self.ranges.get(name), self.parts[name]
            if range is not None:
                for state, value in {PARAMS: range.flat.detach(), **self.optimizer.state.get(range.flat, {})}.items():
                    if _has_parts(value):
                        value = range.of(value, param, part)
                    elif range.flat.ndim:
                        value = deepcopy(value)  # clocks of a partition are shared
                    tree[f"{state}/{name}"] = value
            elif hasattr(param, "ds_tensor") and not param.requires_grad:
                tree[f"{PARAMS}/{name}"] = part.of(of_range(local_shard(param), shard_start(param), shape_here(param)))
            # ZeRO partitions nothing of a parameter without elements
            elif not param.requires_grad or not part.shape.numel():
                own = param.detach()
                tree[f"{PARAMS}/{name}"] = (
                    own if own.shape == part.shape else part.of(of_range(own.view(-1), 0, own.shape))
                )
        return tree

    def put(self, tree: Tree) -> None:
        all_or_none(lambda: self._count(tree), self.engine.deslo.groups.world)
        copy_masters_to_model(self.engine)
        if hasattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            # DeepSpeed's own view of them, else made by a step
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _count(self, tree: Tree) -> None:
        """Takes over plain numbers; those of one partition are one."""
        clocks: dict[Tensor, dict[str, Any]] = {}
        for name, range in self.ranges.items():
            states = self.optimizer.state.get(range.flat, {})
            counted = {state: tree[f"{state}/{name}"] for state, value in states.items() if not _has_parts(value)}
            if clocks.setdefault(range.flat, counted) != counted:
                raise ConfigError(
                    f"load {name}",
                    f"the clocks {clocks[range.flat]} of the other parameters in its partition",
                    str(counted),
                    "load it without ZeRO: parameters that had no gradient at times cannot share one",
                )
            states.update(counted)

    def publish(self) -> None:
        copy_masters_to_model(self.engine)

    @property
    def names(self) -> Mapping[str, str]:
        return places(self.engine.module)

    def get_extra_state(self) -> Mapping[str, Any]:
        engine = self.engine
        scheduler, scaler = (
            getattr(engine.lr_scheduler, "state_dict", None),
            getattr(engine.optimizer, "loss_scaler", None),
        )
        return {
            "counts": {name: getattr(engine, name) for name in COUNTS},
            "scheduler": scheduler() if scheduler else None,
            "scaler": {name: value for name, value in vars(scaler).items() if type(value) in SCALES}
            if scaler
            else None,
        }

    def set_extra_state(self, aside: Mapping[str, Any], steps: int) -> None:
        engine = self.engine
        counts = {"global_steps": steps, "global_samples": steps * engine.train_batch_size()}
        saved = {name: value for name, value in aside.get("counts", {}).items() if name in COUNTS}
        for name, value in (counts | saved).items():
            setattr(engine, name, value)
        if engine.lr_scheduler is not None and aside.get("scheduler") is not None:
            engine.lr_scheduler.load_state_dict(aside["scheduler"])
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        for name, value in (aside.get("scaler") or {}).items():
            if type(getattr(scaler, name, None)) in SCALES and type(value) in SCALES:
                setattr(scaler, name, value)
        if isinstance(engine.deslo.averaging, AnyOptimizerAverager):
            engine.deslo.averaging.resume(steps)

    def _shape(self, name: str, value: Any) -> list[int] | None:
        """Of the whole of a state, of which this rank may have a part."""
        if isinstance(value, Tensor) and value.ndim:
            return list(self.shapes[name])
        return [] if isinstance(value, Tensor) else None

    def _ranges(self) -> Iterator[tuple[str, Range]]:
        """Where this rank's optimizer steps its part of each parameter."""
        wrapper = self.engine.optimizer
        if not self.engine.zero_optimization():
            masters = {id(param): master for param, master in low_precision_pairs(self.engine)}
            for name, param in self.params.items():
                if param.requires_grad:
                    yield name, Range(masters.get(id(param), param), 0, 0, param.numel())
        elif self.engine.zero_optimization_partition_weights():
            for name, param in self.params.items():
                if param.requires_grad and local_shard(param).numel():
                    group, at, _ = wrapper.grad_position[wrapper.get_param_id(param)]
                    flat, numel = wrapper.fp32_partitioned_groups_flat[group], local_shard(param).numel()
                    yield name, Range(flat, at, shard_start(param), numel)
        else:
            for name, param in self.params.items():
                held = getattr(param, "_hp_mapping", None)
                if held is not None:
                    (flat,) = self.groups[held.param_group_index]["params"]
                    high, low = held.hp_fragment_address, held.lp_fragment_address
                    yield name, Range(flat, high.start, low.start, low.numel)


def _has_parts(value: Any) -> bool:
    """Whether a state runs over the elements of what the optimizer steps, which may be of several parameters."""
    return isinstance(value, Tensor) and value.ndim > 0
