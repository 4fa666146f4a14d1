"""An engine's model and optimizer as the tree that every framework shares: each rank's range of each parameter, live."""

import pickle
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from deslo_plugin.frameworks.deepspeed.zero import low_precision_pairs, own_part, publish
from deslo_plugin.frameworks.fragment import Fragment, of_range
from deslo_plugin.frameworks.state_tree import States, Tree, fresh_states, saved_buffers
from deslo_plugin.names import PARAMS
from deslo_plugin.stock import StockAveraging
from deslo_plugin.strict import ConfigError

COUNTS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


class Range(NamedTuple):
    """``numel`` elements of a parameter from ``start`` on, which lie in ``flat`` from ``at`` on."""

    flat: Tensor
    at: int
    start: int
    numel: int

    def of(self, flat: Tensor, shape: Any) -> Fragment:
        return of_range(flat.view(-1).narrow(0, self.at, self.numel), self.start, shape)


class EngineState:
    """Of any ZeRO stage; what is loaded is loaded into the partitions, and published into the model."""

    def __init__(self, engine: DeepSpeedEngine):
        self.engine, self.optimizer = engine, engine.basic_optimizer
        self.params = dict(engine.module.named_parameters())
        self.shapes = {name: getattr(param, "ds_shape", param.shape) for name, param in self.params.items()}
        self.ranges = dict(self._ranges())

    @property
    def states(self) -> States:
        of_stepped = {id(range.flat): self.optimizer.state.get(range.flat, {}) for range in self.ranges.values()}
        own = {
            name: {PARAMS: list(self.shapes[name])} | {
                state: self._shape(name, value) for state, value in of_stepped[id(range.flat)].items()}
            for name, range in self.ranges.items()
        }
        everyone = [None] * self.engine.deslo.topology.replica_size  # each rank has ranges of some parameters only
        dist.all_gather_object(everyone, own, group=self.engine.deslo.groups.shard)
        frozen = {name: {PARAMS: list(shape)} for name, shape in self.shapes.items()}
        return frozen | {name: states for each in everyone for name, states in each.items()}

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        return self.optimizer.param_groups

    def prepare(self, saved: States) -> None:
        for name, range in self.ranges.items():
            if not self.optimizer.state.get(range.flat):
                self.optimizer.state[range.flat].update(fresh_states(saved.get(name, {}), range.flat, self.shapes[name]))

    def tree(self) -> Tree:
        tree: Tree = {f"buffers/{name}": buffer for name, buffer in saved_buffers(self.engine.module).items()}
        for name, param in self.params.items():
            range, shape = self.ranges.get(name), self.shapes[name]
            if range is not None:
                for state, value in {PARAMS: range.flat.detach(), **self.optimizer.state.get(range.flat, {})}.items():
                    if _has_parts(value):
                        value = range.of(value, shape)
                    elif range.flat.ndim:
                        value = deepcopy(value)  # clocks of a partition are shared
                    tree[f"{state}/{name}"] = value
            elif hasattr(param, "ds_tensor") and not param.requires_grad:
                start = dist.get_rank(param.ds_process_group) * param.partition_numel()
                tree[f"{PARAMS}/{name}"] = of_range(own_part(param), start, shape)
            elif not param.requires_grad:
                tree[f"{PARAMS}/{name}"] = param.detach()
        return tree

    def put(self, tree: Tree) -> None:
        clocks: dict[Tensor, dict[str, Any]] = {}
        for name, range in self.ranges.items():
            states = self.optimizer.state.get(range.flat, {})
            counted = {state: tree[f"{state}/{name}"] for state, value in states.items() if not _has_parts(value)}
            if clocks.setdefault(range.flat, counted) != counted:
                raise ConfigError(f"load {name}", f"the clocks {clocks[range.flat]} of the other parameters in its partition",
                                  str(counted), "load it without ZeRO: parameters that had no gradient at times cannot share one")
            states.update(counted)
        publish(self.engine)
        if hasattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed's own view of them, else made by a step

    def aside(self) -> bytes:
        engine = self.engine
        scheduler = getattr(engine.lr_scheduler, "state_dict", None)
        return pickle.dumps({
            "counts": {name: getattr(engine, name) for name in COUNTS},
            "scheduler": scheduler() if scheduler else None,
            "scaler": getattr(engine.optimizer, "loss_scaler", None),
        })

    def put_aside(self, aside: bytes, steps: int) -> None:
        engine, aside = self.engine, pickle.loads(aside) if aside else {}
        counts = {"global_steps": steps, "global_samples": steps * engine.train_batch_size()}
        for name, value in (counts | aside.get("counts", {})).items():
            setattr(engine, name, value)
        if engine.lr_scheduler is not None and aside.get("scheduler") is not None:
            engine.lr_scheduler.load_state_dict(aside["scheduler"])
        if aside.get("scaler") is not None and hasattr(engine.optimizer, "loss_scaler"):
            engine.optimizer.loss_scaler = aside["scaler"]
        if isinstance(engine.deslo.averaging, StockAveraging):
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
                if param.requires_grad and own_part(param).numel():
                    group, at, _ = wrapper.grad_position[wrapper.get_param_id(param)]
                    start = dist.get_rank(param.ds_process_group) * param.partition_numel()
                    yield name, Range(wrapper.fp32_partitioned_groups_flat[group], at, start, own_part(param).numel())
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
