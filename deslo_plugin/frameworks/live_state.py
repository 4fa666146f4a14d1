"""What one rank of a replica gives to a latecomer, and how a latecomer becomes the replica that it is of: tensors,
numbers and text alone, and of a sharded tensor this rank's part."""

import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checkpoint.resharding import reshard
from deslo_plugin.checkpoint.state_dict_guard import local_state_dict
from deslo_plugin.checks.replica_checks import model_traits, optimizer_traits
from deslo_plugin.comm.consistency import digests
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.local_tensors import local

SUBJECTS = ("config and param groups", "model", "initial values of the parameters")  # what founders must have alike


class Replica:
    """What this rank has of one replica of ``size`` ranks: what a latecomer's same rank takes over, and by what
    replicas are told to be of one kind."""

    def __init__(self, model: nn.Module, averaging: StateAverager, config: Config, size: int):
        self.model, self.averaging = model, averaging
        self.settings = {key: str(value) for key, value in optimizer_traits(averaging, config).items()}
        self.settings["ranks of a replica"] = str(size)
        cuts = {name: _cut(param) for name, param in model.named_parameters()}
        shapes = model_traits(model, lambda p: p.shape)
        self.shapes = {f"model parameter {name}": f"{kind}{cuts[name]}" for name, kind in shapes.items()}

    @property
    def steps(self) -> int:
        return self.averaging.steps

    def fingerprints(self) -> list[int]:
        """A hash of 52 bits, exact in float64, of each of ``SUBJECTS``; of values, which are those of this rank's
        parts, only before the first step."""
        reshard(self.model)
        names, params = zip(*self.model.named_parameters())
        values = {} if self.steps else digests(zip(names, local(params)))
        return [_hash(subject) for subject in (self.settings, self.shapes, values)]

    def state(self) -> dict[str, Any]:
        """Parameters, buffers, every state and clock of the optimizer, and what they are states of."""
        reshard(self.model)
        with local_state_dict():
            model, optimizer = self.model.state_dict(), self.averaging.optimizer.state_dict()
        groups = optimizer["param_groups"]  # whose periods are the config's
        optimizer["param_groups"] = [{key: group[key] for key in group if key != "sync_every"} for group in groups]
        optimizer["state"] = {index: _parts_of(states) for index, states in optimizer["state"].items()}
        return {"traits": self.settings | self.shapes, "model": _parts_of(model), "optimizer": optimizer}

    def refuse_other(self, state: Mapping[str, Any]) -> None:
        """Raises ``ConfigError`` if ``state`` is of a replica of another kind."""
        mine, theirs = self.settings | self.shapes, state["traits"]
        for key in [*theirs, *mine]:
            if mine.get(key) != theirs.get(key):
                raise ConfigError(
                    key,
                    f"{theirs.get(key, 'nothing')} as in the replicas that train",
                    mine.get(key, "nothing"),
                    "start this replica with their config and model",
                )

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Becomes the replica that ``state`` is of. Not collective: the other ranks of this replica do the same."""
        reshard(self.model)
        with local_state_dict():
            own = self.model.state_dict(keep_vars=True)
        optimizer = self.averaging.optimizer
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        indices = chain.from_iterable(group["params"] for group in state["optimizer"]["param_groups"])
        of_index = dict(zip(indices, params))
        states = {
            index: {name: _whole(value, of_index[index]) for name, value in of_param.items()}
            for index, of_param in state["optimizer"]["state"].items()
        }
        self.model.load_state_dict({name: _whole(value, own.get(name)) for name, value in state["model"].items()})
        optimizer.load_state_dict({**state["optimizer"], "state": states})


def refuse_cuts(model: nn.Module) -> None:
    """Raises ``ConfigError`` for a parameter that is cut in a way that plain numbers do not say."""
    for name, param in model.named_parameters():
        if isinstance(param, DTensor) and not all(type(each) in (Replicate, Shard) for each in param.placements):
            raise ConfigError(
                f"attach(manager=...) parameter {name}",
                "a DTensor of Shard and Replicate alone",
                str(list(param.placements)),
                "shard it by fully_shard over all ranks of the replica, without tensor parallelism",
            )


def _parts_of(named: Mapping[str, Any]) -> dict[str, Any]:
    """``named`` with this rank's part of each DTensor, and how it is cut."""
    found = dict(named)
    for name, value in named.items():
        if isinstance(value, DTensor):
            cut = [each.dim if isinstance(each, Shard) else None for each in value.placements]
            (own,) = local([value.detach()])
            found[name] = {"part": own, "shape": list(value.shape), "stride": list(value.stride()), "cut": cut}
    return found


def _whole(value: Any, like: Any) -> Any:
    """The DTensor, on the mesh of ``like``, of which ``_parts_of`` gave this rank's part; anything else as it is."""
    if not (isinstance(like, DTensor) and isinstance(value, dict) and "part" in value):
        return value
    placements = [Replicate() if dim is None else Shard(dim) for dim in value["cut"]]
    own: Tensor = value["part"].to(local([like])[0].device)
    shape, stride = torch.Size(value["shape"]), tuple(value["stride"])
    return DTensor.from_local(own, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _cut(param: Tensor) -> str:
    """How ``param`` is cut, and what of it lies on this rank, in the words of a message; "" of a plain one."""
    if not isinstance(param, DTensor):
        return ""
    own: Tensor = local([param])[0]
    return f" cut {list(param.placements)}, {tuple(own.shape)} of it on this rank"


def _hash(subject: Mapping[str, str]) -> int:
    return int.from_bytes(hashlib.sha256(repr(sorted(subject.items())).encode()).digest()[:6], "big")
