"""A model and its optimizer as one tree of named tensors, the same tree in every framework."""

import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deslo_plugin.algorithm.state_names import BUFFERS, ORIGIN, PARAMS, STEP
from deslo_plugin.attachment import Attachment
from deslo_plugin.checkpoint.state_dict_guard import one_replica
from deslo_plugin.checkpoint.tensor_chunks import Fragment, of_dtensor
from deslo_plugin.checks.module_wrappers import bare
from deslo_plugin.comm.transport import gathered
from deslo_plugin.config.reader import ConfigError
from deslo_plugin.frameworks import fsdp2 as fsdp
from deslo_plugin.optim.any_optimizer import StockAveraging
from deslo_plugin.optim.desloc import DesLoc

Tree = dict[str, Any]
"""``"<state>/<parameter>"`` and ``"buffers/<buffer>"`` -> live tensor, this rank's ``Fragment`` of one, or the plain
number that a stock optimizer counts in."""

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

    def aside(self) -> Mapping[str, Any]:
        """What else the framework counts in, such as a loss scale: plain values."""

    def put_aside(self, aside: Mapping[str, Any], steps: int) -> None:
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
            raise ConfigError(
                f"{where} parameter {name}",
                "the parameters of this model",
                f"none of that name in the {'model' if name in saved else 'checkpoint'}",
                "build the model that was saved",
            )
        mine, others = _shown(own[name]), _shown(saved[name])
        if mine != others:
            raise ConfigError(
                f"{where} {name}", mine, others, "build the model and configure the optimizer that were saved"
            )


def _shown(states: Mapping[str, Sequence[int] | None]) -> str:
    return ", ".join(name if shape is None else f"{name} {list(shape)}" for name, shape in sorted(states.items()))


def shapes_of(states: Mapping[str, Any]) -> dict[str, list[int] | None]:
    return {name: list(value.shape) if hasattr(value, "shape") else None for name, value in states.items()}


class TorchState:
    """Live tensors and shards: what is loaded is loaded in place, in whatever sharding there is."""

    def __init__(self, model: nn.Module, attachments: Sequence[Attachment]):
        self.averagings = [attachment.averaging for attachment in attachments]
        fsdp.reshard(model)
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
        tree = {f"{BUFFERS}/{name}": buffer for name, buffer in self.buffers.items()}
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
        fsdp.reshard(self.model)

    @property
    def names(self) -> Mapping[str, str]:
        return places(self.model)

    def aside(self) -> Mapping[str, Any]:
        return {}

    def put_aside(self, aside: Mapping[str, Any], steps: int) -> None:
        for averaging in self.averagings:
            if isinstance(averaging, StockAveraging):
                averaging.resume(steps)

    def _states_of(self, param: Tensor) -> dict[str, Any]:
        return self._stepped_by[param].state.get(param, {}) if param in self._stepped_by else {}


def united(states: States, group: dist.ProcessGroup | None) -> States:
    """The states of all ranks: a replica has none yet of a parameter that others alone have trained. Collective."""
    if group is None:
        return states
    digest = hashlib.sha256(repr(sorted(states.items())).encode()).hexdigest()
    if len(set(gathered(digest, group).values())) == 1:
        return states
    everyone = gathered(states, group).values()
    return {name: {state: shape for each in everyone for state, shape in each.get(name, {}).items()} for name in states}


def unlike(tree: Tree, scheduled: Set[str], group: dist.ProcessGroup | None) -> Tree:
    """What ``tree`` lacks beside the same shard of other replicas, which have trained other parameters: zeros for
    states, and for counters that differ those of the replica that has updated the parameter most often. Collective over
    ``group``.

    ``scheduled``: names of states that have a mean, even of a parameter without dimensions.
    """
    if group is None:
        return {}
    mine = {
        name: _described(name, value, scheduled)
        for name, value in tree.items()
        if not name.startswith((f"{PARAMS}/", f"{BUFFERS}/"))
    }
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    if len(set(gathered(digest, group).values())) == 1:
        return {}
    everyone = list(gathered(mine, group).values())
    more: Tree = {}
    for name in sorted({name for each in everyone for name in each}):
        state, param = name.split("/", 1)
        furthest = max((each for each in everyone if name in each), key=lambda each: _count(each, param))
        what, value, *is_tensor = furthest[name]
        if what == "counter":
            own = tree.get(name)
            more[name] = (
                torch.full_like(own, value)
                if isinstance(own, Tensor)
                else torch.tensor(value)
                if is_tensor[0]
                else value
            )
        elif any(name not in each for each in everyone) and list(value[1]) != list(tree[f"{PARAMS}/{param}"].shape):
            raise ConfigError(
                f"state {name}",
                "the shape of its parameter where a replica has not trained it yet",
                str(value[1]),
                "train every parameter on every replica before you save or meet",
            )
        elif name not in tree:
            like, dtype = tree[f"{PARAMS}/{param}"], getattr(torch, value[0])
            zeros = (
                [torch.zeros_like(piece, dtype=dtype) for _, piece in like.pieces]
                if isinstance(like, Fragment)
                else None
            )
            more[name] = torch.zeros_like(like, dtype=dtype) if zeros is None else like.like(zeros)
    return more


def _described(name: str, value: Any, scheduled: Set[str]) -> tuple[Any, ...]:
    if isinstance(value, Fragment):
        dtype = str(value.pieces[0][1].dtype).removeprefix("torch.") if value.pieces else "float32"
        return "state", (dtype, tuple(value.shape))
    if isinstance(value, Tensor) and (value.ndim or name.split("/", 1)[0] in scheduled):
        return "state", (str(value.dtype).removeprefix("torch."), tuple(value.shape))
    return ("counter", value.item(), True) if isinstance(value, Tensor) else ("counter", value, False)


def _count(described: Mapping[str, tuple[Any, ...]], param: str) -> float:
    """How often a replica has updated a parameter, by its counters."""
    steps, origin = (described.get(f"{counter}/{param}", (None, 0))[1] for counter in (STEP, ORIGIN))
    return steps - origin if isinstance(steps, int | float) and isinstance(origin, int | float) else 0


def fresh_states(
    saved: Mapping[str, Sequence[int] | None], param: Tensor, whole: Sequence[int] | None = None
) -> dict[str, Any]:
    """Zeros for the ``saved`` states of ``param``, whose whole shape is ``whole``: with its shape, or without
    dimensions."""
    whole, fresh = list(param.shape if whole is None else whole), {}
    for state, shape in saved.items():
        if state != PARAMS:
            if shape not in (None, [], whole):
                raise ConfigError(
                    f"load state {state}",
                    f"the shape of its parameter, {whole}",
                    str(shape),
                    "take one step before you load, so that the optimizer has created it",
                )
            tensor = (
                torch.zeros_like(param)
                if shape or whole == [] and state != STEP
                else torch.zeros((), dtype=torch.float32)
            )
            fresh[state] = 0 if shape is None else tensor
    return fresh


def saved_state(model: nn.Module) -> dict[str, Any]:
    """Plain name -> what this replica's ``state_dict()`` holds under it, in its order: live parameters and buffers,
    those with several names under each of them, and what modules add to it. FSDP2 gives shards."""
    fsdp.reshard(model)
    with one_replica():
        return {plain_name(name): value for name, value in bare(model).state_dict(keep_vars=True).items()}


def places(model: nn.Module) -> dict[str, str]:
    """Name in ``state_dict()`` of the plain model, in its order -> where in the tree the tensor is that it names."""
    params = {plain_name(name): param for name, param in bare(model).named_parameters()}
    named = {f"{BUFFERS}/{name}": buffer for name, buffer in saved_buffers(model).items()}
    named |= {f"{PARAMS}/{name}": param for name, param in params.items()}
    of_tensor = {id(tensor): place for place, tensor in named.items()}
    found = {}
    # a hook of the user's may have put a copy under the name of a parameter
    for name, value in saved_state(model).items():
        place = of_tensor.get(id(value)) or next(
            (f"{kind}/{name}" for kind in (PARAMS, BUFFERS) if f"{kind}/{name}" in named), None
        )
        if place is not None:
            found[name] = place
    return found


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Plain name, the first of several -> buffer, of those that belong to the model's state."""
    buffers, found = {id(buffer) for buffer in model.buffers()}, {}
    for name, value in saved_state(model).items():
        if id(value) in buffers:
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
