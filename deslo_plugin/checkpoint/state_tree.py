"""A model and its optimizer as one tree of named tensors, the same tree in every framework."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from deslo_plugin.algorithm.state_names import BUFFERS, PARAMS
from deslo_plugin.attachment import Attachment
from deslo_plugin.checkpoint.model_names import places, plain_name, saved_buffers
from deslo_plugin.checkpoint.resharding import reshard
from deslo_plugin.checkpoint.tensor_chunks import of_dtensor
from deslo_plugin.checkpoint.tree_agreement import States, Tree, fresh_states
from deslo_plugin.checks.module_wrappers import bare
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.desloc import DesLoc

KEPT = ("lr", "initial_lr")  # of a param group; betas and periods are the config's


class StateAdapter(Protocol):
    """Where a framework keeps model and optimizer; ``Attachment.state_adapter`` makes it of the model and all of its
    attachments."""

    @property
    def states(self) -> States: ...

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        """The optimizer's param groups."""

    def prepare(self, saved: States) -> None:
        """Creates those of the ``saved`` states that a stock optimizer makes at its first step."""

    def forget(self, names: Sequence[str]) -> None:
        """Drops states by their names in the tree, which this replica did not have yet when it saved."""

    def tree(self) -> Tree:
        """What to save, and what to load into, in place."""

    def put(self, tree: Tree) -> None:
        """Makes a tree that was loaded the state."""

    def publish(self) -> None:
        """Lets the next forward see what was written into the tree's parameters."""

    @property
    def names(self) -> Mapping[str, str]:
        """Each name that the plain model's ``state_dict()`` gives, in its order -> where its tensor is in the tree."""

    def get_extra_state(self) -> Mapping[str, Any]:
        """What else the framework counts in, such as a loss scale: plain values."""

    def set_extra_state(self, aside: Mapping[str, Any], steps: int) -> None:
        """Takes over the number of completed steps, and what ``aside`` gave if it was this framework's."""


def adapter_of(model: Any, attachments: Sequence[Attachment]) -> StateAdapter:
    return attachments[0].state_adapter(model, attachments)


def shapes_of(states: Mapping[str, Any]) -> dict[str, list[int] | None]:
    return {name: list(value.shape) if hasattr(value, "shape") else None for name, value in states.items()}


class TorchState:
    """Live tensors and shards: what is loaded is loaded in place, in whatever sharding there is."""

    def __init__(self, model: nn.Module, attachments: Sequence[Attachment]):
        self.averagings = [attachment.averaging for attachment in attachments]
        reshard(model)
        self.model = model = bare(model)
        self.params = {plain_name(name): param for name, param in model.named_parameters()}
        self._stepped_by = {
            param: averaging.optimizer
            for averaging in self.averagings
            for group in averaging.groups
            for param in group["params"]
        }
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
            # frozen when it was saved, it begins to train now, or the other way round
            if isinstance(optimizer, DesLoc):
                if set(states) <= {PARAMS}:
                    optimizer.state.pop(param, None)
                elif not self._states_of(param):
                    optimizer._create_state(param)
            elif optimizer and not self._states_of(param):
                optimizer.state[param].update(fresh_states(states, param))

    def forget(self, names: Sequence[str]) -> None:
        for name in names:
            state, param = name.split("/", 1)
            self._states_of(self.params[param]).pop(state)

    def tree(self) -> Tree:
        tree: Tree = {f"{BUFFERS}/{name}": buffer for name, buffer in self.buffers.items()}
        for name, param in self.params.items():
            for state, value in {PARAMS: param.detach(), **self._states_of(param)}.items():
                tree[f"{state}/{name}"] = of_dtensor(value) if hasattr(value, "to_local") else value
        return tree

    def put(self, tree: Tree) -> None:
        for name, param in self.params.items():
            states = self._states_of(param)
            for state, value in states.items():
                new = tree[f"{state}/{name}"]
                if not isinstance(value, Tensor):
                    states[state] = new
                elif value.ndim == 0 and isinstance(new, Tensor) and new is not value:
                    value.copy_(new)

    def publish(self) -> None:
        reshard(self.model)

    @property
    def names(self) -> Mapping[str, str]:
        return places(self.model)

    def get_extra_state(self) -> Mapping[str, Any]:
        return {}

    def set_extra_state(self, aside: Mapping[str, Any], steps: int) -> None:
        for averaging in self.averagings:
            if isinstance(averaging, AnyOptimizerAverager):
                averaging.resume(steps)

    def _states_of(self, param: Tensor) -> dict[str, Any]:
        return self._stepped_by[param].state.get(param, {}) if param in self._stepped_by else {}
