"""A model and its optimizer as one tree of named tensors, the same tree in every framework."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.frameworks.attachment import Attachment
from deslo_plugin.frameworks.fragment import of_dtensor
from deslo_plugin.frameworks.one_model import one_replica
from deslo_plugin.names import PARAMS, STEP
from deslo_plugin.optimizer import DesLoc
from deslo_plugin.stock import StockAveraging
from deslo_plugin.strict import ConfigError

Tree = dict[str, Any]
"""``"<state>/<parameter>"`` and ``"buffers/<buffer>"`` -> live tensor, this rank's ``Fragment`` of one, or the plain number that
a stock optimizer counts in."""

States = Mapping[str, Mapping[str, Sequence[int] | None]]
"""Parameter -> its states, the parameter itself among them -> shape of the whole tensor; None for a plain number."""

KEPT = ("lr", "initial_lr")  # of a param group; betas and periods are the config's
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class Holder(Protocol):
    @property
    def states(self) -> States: ...

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        """The optimizer's param groups."""

    def prepare(self, saved: States) -> None:
        """Creates those of the ``saved`` states that a stock optimizer makes at its first step."""

    def tree(self) -> Tree:
        """What to save, and what to load into, in place."""

    def put(self, tree: Tree) -> None:
        """Makes a tree that was loaded the state."""

    def aside(self) -> bytes:
        """What else the framework counts in, such as a loss scale."""

    def put_aside(self, aside: bytes, steps: int) -> None:
        """Takes over the number of completed steps, and what ``aside`` gave if it was this framework's."""


def holder_of(model: Any, attachments: Sequence[Attachment]) -> Holder:
    if hasattr(model, "basic_optimizer"):
        from deslo_plugin.frameworks.deepspeed.state_tree import EngineState

        return EngineState(model)
    return TorchState(model, attachments)


def refuse_others(own: States, saved: States, where: str) -> None:
    """Raises ``ConfigError`` if ``saved`` has other parameters, or other states or shapes of them, than ``own``."""
    for name in dict.fromkeys([*saved, *own]):
        if name not in saved or name not in own:
            raise ConfigError(f"{where} parameter {name}", "the parameters of this model",
                              f"none of that name in the {'model' if name in saved else 'checkpoint'}", "build the model that was saved")
        mine, others = _shown(own[name]), _shown(saved[name])
        if mine != others:
            raise ConfigError(f"{where} {name}", mine, others, "build the model and configure the optimizer that were saved")


def _shown(states: Mapping[str, Sequence[int] | None]) -> str:
    return ", ".join(name if shape is None else f"{name} {list(shape)}" for name, shape in sorted(states.items()))


def shapes_of(states: Mapping[str, Any]) -> dict[str, list[int] | None]:
    return {name: list(value.shape) if hasattr(value, "shape") else None for name, value in states.items()}


class TorchState:
    """Live tensors and shards: what is loaded is loaded in place, in whatever sharding there is."""

    def __init__(self, model: nn.Module, attachments: Sequence[Attachment]):
        self.averagings = [attachment.averaging for attachment in attachments]
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self.params = {plain_name(name): param for name, param in model.named_parameters()}
        self._stepped_by = {
            param: averaging.optimizer for averaging in self.averagings for group in averaging.groups for param in group["params"]}
        self.buffers = saved_buffers(model)

    @property
    def states(self) -> States:
        return {name: shapes_of({PARAMS: param, **self._states_of(param)}) for name, param in self.params.items()}

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        return [group for averaging in self.averagings for group in averaging.optimizer.param_groups]

    def prepare(self, saved: States) -> None:
        for name, param in self.params.items():
            optimizer, states = self._stepped_by.get(param), saved.get(name, {})
            if isinstance(optimizer, DesLoc):  # frozen when it was saved, it begins to train now, or the other way round
                if set(states) <= {PARAMS}:
                    optimizer.state.pop(param, None)
                elif not self._states_of(param):
                    optimizer._create_state(param)
            elif optimizer and not self._states_of(param):
                optimizer.state[param].update(fresh_states(states, param))

    def tree(self) -> Tree:
        tree = {f"buffers/{name}": buffer for name, buffer in self.buffers.items()}
        for name, param in self.params.items():
            for state, value in {PARAMS: param.detach(), **self._states_of(param)}.items():
                tree[f"{state}/{name}"] = of_dtensor(value) if hasattr(value, "to_local") else value
        return tree

    def put(self, tree: Tree) -> None:
        for name, param in self.params.items():
            states = self._states_of(param)
            states.update({state: tree[f"{state}/{name}"] for state, value in states.items() if not isinstance(value, Tensor)})

    def aside(self) -> bytes:
        return b""

    def put_aside(self, aside: bytes, steps: int) -> None:
        for averaging in self.averagings:
            if isinstance(averaging, StockAveraging):
                averaging.resume(steps)

    def _states_of(self, param: Tensor) -> dict[str, Any]:
        return self._stepped_by[param].state.get(param, {}) if param in self._stepped_by else {}


def fresh_states(saved: Mapping[str, Sequence[int] | None], param: Tensor, whole: Sequence[int] | None = None) -> dict[str, Any]:
    """Zeros for the ``saved`` states of ``param``, whose whole shape is ``whole``: with its shape, or without dimensions."""
    whole, fresh = list(param.shape if whole is None else whole), {}
    for state, shape in saved.items():
        if state != PARAMS:
            if shape not in (None, [], whole):
                raise ConfigError(f"load state {state}", f"the shape of its parameter, {whole}", str(shape),
                                  "take one step before you load, so that the optimizer has created it")
            tensor = torch.zeros_like(param) if shape or whole == [] and state != STEP else torch.zeros((), dtype=torch.float32)
            fresh[state] = 0 if shape is None else tensor
    return fresh


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, of those that belong to the model's state."""
    with one_replica():
        saved = model.state_dict(keep_vars=True)
    return {plain_name(name): buffer for name, buffer in model.named_buffers() if name in saved}


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
