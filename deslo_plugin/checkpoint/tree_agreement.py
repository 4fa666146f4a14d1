"""How the trees of replicas, and the tree of a checkpoint, become one: what is missing, and what must not differ."""

import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.algorithm.state_names import BUFFERS, ORIGIN, PARAMS, STEP, is_of_wire
from deslo_plugin.checkpoint.tensor_chunks import TensorChunks
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.errors import ConfigError

Tree = dict[str, Any]
"""``"<state>/<parameter>"`` and ``"buffers/<buffer>"`` -> live tensor, this rank's ``TensorChunks`` of one, or the
plain number that a stock optimizer counts in."""

States = Mapping[str, Mapping[str, Sequence[int] | None]]
"""Parameter -> its states, the parameter itself among them -> shape of the whole tensor; None for a plain number."""


def check_same_structure(own: States, saved: States, where: str) -> None:
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
    return ", ".join(
        name if shape is None else f"{name} {list(shape)}"
        for name, shape in sorted(states.items())
        if not is_of_wire(name)
    )


def united(states: States, group: dist.ProcessGroup | None) -> States:
    """The states of all ranks: a replica has none yet of a parameter that others alone have trained, and a rank may
    hold a part of the model alone. Collective."""
    if group is None:
        return states
    digest = hashlib.sha256(repr(sorted(states.items())).encode()).hexdigest()
    if len(set(all_gather_by_rank(digest, group).values())) == 1:
        return states
    everyone = all_gather_by_rank(states, group).values()
    names = dict.fromkeys(name for each in everyone for name in each)
    return {name: {state: shape for each in everyone for state, shape in each.get(name, {}).items()} for name in names}


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
    if len(set(all_gather_by_rank(digest, group).values())) == 1:
        return {}
    everyone = list(all_gather_by_rank(mine, group).values())
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
                "train every parameter on every replica before you save or call sync_replicas",
            )
        elif name not in tree:
            like, dtype = tree[f"{PARAMS}/{param}"], getattr(torch, value[0])
            zeros = (
                [torch.zeros_like(piece, dtype=dtype) for _, piece in like.pieces]
                if isinstance(like, TensorChunks)
                else None
            )
            more[name] = torch.zeros_like(like, dtype=dtype) if zeros is None else like.like(zeros)
    return more


def _described(name: str, value: Any, scheduled: Set[str]) -> tuple[Any, ...]:
    if isinstance(value, TensorChunks):
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
    dimensions. Those of averages in few bits are left out: they begin otherwise."""
    whole, fresh = list(param.shape if whole is None else whole), {}
    for state, shape in saved.items():
        if state != PARAMS and not is_of_wire(state):
            if shape not in (None, [], whole):
                raise ConfigError(
                    f"load state {state}",
                    f"the shape of its parameter, {whole}",
                    str(shape),
                    "take one step before you load, so that the optimizer has created it",
                )
            tensor = (
                torch.zeros_like(param)
                if shape or (whole == [] and state != STEP)
                else torch.zeros((), dtype=torch.float32)
            )
            fresh[state] = 0 if shape is None else tensor
    return fresh
