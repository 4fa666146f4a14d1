"""An engine's model and optimizer as the tree that every framework shares: whole tensors, out of whatever ZeRO made of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor

from deslo_plugin.frameworks.deepspeed.export import full_params
from deslo_plugin.frameworks.deepspeed.zero import low_precision_pairs, partitions, publish
from deslo_plugin.frameworks.state_tree import Tree
from deslo_plugin.names import ORIGIN, PARAMS, STEP
from deslo_plugin.optimizer import DesLoc
from deslo_plugin.strict import ConfigError


class EngineState:
    """Copies: a loaded tree becomes the state in ``put``. Collective over the replica; needs room for a whole copy."""

    def __init__(self, engine: DeepSpeedEngine):
        if not isinstance(engine.basic_optimizer, DesLoc):
            raise ConfigError("save or load", "a DesLoc under DeepSpeed", type(engine.basic_optimizer).__name__,
                              "use engine.save_checkpoint, which keeps every replica's own state")
        self.engine, self.optimizer = engine, engine.basic_optimizer
        if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # which DeepSpeed does at the end of the first step
        outer = ["outer_momentum", "outer_params"] if self.optimizer.config.optimizer.outer else []
        self.moments = [*self.optimizer.config.optimizer.moments, *outer]

    @property
    def states(self) -> dict[str, list[str]]:
        return {name: sorted([*self.moments, STEP, ORIGIN]) for name in self._names()}

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        return self.optimizer.param_groups

    def prepare(self, saved: Mapping[str, Sequence[str]]) -> None:
        pass  # DesLoc has its states from the start

    def tree(self) -> Tree:
        module, tree = self.engine.module, {}
        saved = module.state_dict(keep_vars=True)
        tree |= {f"buffers/{name}": buffer for name, buffer in module.named_buffers() if name in saved}
        clocks = self.optimizer.state[next(self._stepped())]
        for name, full in full_params(self.engine):
            tree[f"{PARAMS}/{name}"] = full.clone()
            tree |= {f"{clock}/{name}": clocks[clock].clone() for clock in (STEP, ORIGIN)}
        masters = self._masters()
        for name, param in module.named_parameters():
            for moment in self.moments:
                sharded = self.engine.zero_optimization()
                full = safe_get_full_optimizer_state(param, moment) if sharded else self.optimizer.state[masters[name]][moment]
                tree[f"{moment}/{name}"] = full.detach().clone()
        return tree

    def put(self, tree: Tree) -> None:
        masters = self._masters()
        for name, param in self.engine.module.named_parameters():
            for state in (PARAMS, *self.moments):
                value = tree[f"{state}/{name}"]
                if not self.engine.zero_optimization():
                    (masters[name] if state == PARAMS else self.optimizer.state[masters[name]][state]).copy_(value)
                elif state == PARAMS:
                    safe_set_full_fp32_param(param, value)
                else:
                    safe_set_full_optimizer_state(param, value, state)
        first = self._names()[0]
        for param in self._stepped():
            for clock in (STEP, ORIGIN):
                self.optimizer.state[param][clock].copy_(tree[f"{clock}/{first}"])
        publish(self.engine)
        self.engine.global_steps = int(tree[f"{STEP}/{first}"])
        self.engine.global_samples = self.engine.global_steps * self.engine.train_batch_size()

    def _names(self) -> list[str]:
        return [name for name, _ in self.engine.module.named_parameters()]

    def _masters(self) -> dict[str, Tensor]:
        """Of ZeRO stage 0: parameter name -> what the optimizer steps."""
        of_low = {id(param): master for param, master in low_precision_pairs(self.engine)}
        return {name: of_low.get(id(param), param) for name, param in self.engine.module.named_parameters()}

    def _stepped(self) -> Iterator[Tensor]:
        return (tensor for of_group in partitions(self.engine) for tensor in of_group)
