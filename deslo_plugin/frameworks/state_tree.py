"""A model and its optimizer as one tree of named tensors, the same tree in every framework."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deslo_plugin.clock import GROUP_STEP
from deslo_plugin.frameworks.attachment import Attachment
from deslo_plugin.names import PARAMS, STEP
from deslo_plugin.stock import StockAveraging
from deslo_plugin.strict import ConfigError

Tree = dict[str, Any]
"""``"<state>/<parameter>"`` and ``"buffers/<buffer>"`` -> tensor, or the plain number that a stock optimizer counts in."""

KEPT = ("lr", "initial_lr", GROUP_STEP)  # of a param group; betas and periods are the config's
WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class Holder(Protocol):
    @property
    def states(self) -> dict[str, list[str]]:
        """Parameter name -> the names of its states."""

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        """The optimizer's param groups."""

    def prepare(self, saved: Mapping[str, Sequence[str]]) -> None:
        """Creates those of the ``saved`` states that a stock optimizer makes at its first step."""

    def tree(self) -> Tree:
        """What to save, and what to load into."""

    def put(self, tree: Tree) -> None:
        """Makes a loaded tree the state."""


def holder_of(model: Any, attachment: Attachment) -> Holder:
    if hasattr(model, "basic_optimizer"):
        from deslo_plugin.frameworks.deepspeed.state_tree import EngineState

        return EngineState(model)
    return TorchState(model, attachment)


def refuse_others(own: Mapping[str, Sequence[str]], saved: Mapping[str, Sequence[str]], where: str) -> None:
    """Raises ``ConfigError`` if ``saved`` has other parameters, or other states of them, than ``own``."""
    for name in dict.fromkeys([*saved, *own]):
        if name not in saved or name not in own:
            raise ConfigError(f"{where} parameter {name}", "the parameters of this model",
                              f"none of that name in the {'model' if name in saved else 'checkpoint'}", "build the model that was saved")
        if sorted(saved[name]) != sorted(own[name]):
            raise ConfigError(f"{where} states of {name}", ", ".join(sorted(own[name])) or "none",
                              ", ".join(sorted(saved[name])) or "none", "configure the optimizer that was saved")


class TorchState:
    """Live tensors, DTensors among them: what is loaded is loaded in place, in whatever sharding there is."""

    def __init__(self, model: nn.Module, attachment: Attachment):
        self.averaging, self.optimizer = attachment.averaging, attachment.optimizer
        self.params = {plain_name(name): param for name, param in model.named_parameters()}
        saved = model.state_dict(keep_vars=True)
        self.buffers = {plain_name(name): buffer for name, buffer in model.named_buffers() if name in saved}

    @property
    def states(self) -> dict[str, list[str]]:
        return {name: sorted(self.optimizer.state.get(param, {})) for name, param in self.params.items()}

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        return self.optimizer.param_groups

    def prepare(self, saved: Mapping[str, Sequence[str]]) -> None:
        for name, param in self.params.items():
            if not self.optimizer.state.get(param):
                for state in saved.get(name, ()):
                    like = torch.zeros(()) if state == STEP else param
                    self.optimizer.state[param][state] = torch.zeros_like(like, memory_format=torch.preserve_format)

    def tree(self) -> Tree:
        tree = {f"buffers/{name}": buffer for name, buffer in self.buffers.items()}
        for name, param in self.params.items():
            tree[f"{PARAMS}/{name}"] = param.detach()
            tree |= {f"{state}/{name}": value for state, value in self.optimizer.state.get(param, {}).items()}
        return tree

    def put(self, tree: Tree) -> None:
        for name, param in self.params.items():
            for state in self.optimizer.state.get(param, {}):
                self.optimizer.state[param][state] = tree[f"{state}/{name}"]
        if isinstance(self.averaging, StockAveraging):
            self.averaging.learn_states(True)  # they are there now, and some may be due before the first update


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
