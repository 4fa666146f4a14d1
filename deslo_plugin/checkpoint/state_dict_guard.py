"""What a state dict of one replica is taken for: the model.

Between averages every replica has its own parameters and momenta. Whatever saves them by ``state_dict()``, be it
``torch.save``, ``torch.distributed.checkpoint`` or a trainer, would write one replica, or a mixture of several. By
``deslo.state_dict`` such a call is refused, gives the average of now, or that of the last average of the parameters.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from deslo_plugin.attachment import Attachment
from deslo_plugin.averaging.last_average import LastAverage
from deslo_plugin.checkpoint.replica_mean import averages, mean_of, mean_shard, whole
from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.log import log_rank0

Owner = nn.Module | torch.optim.Optimizer


@dataclass
class _Guard:
    """Of an owner of state: the attachments that step it, and the way from a parameter of the model to the whole of it.
    ``inner``: a part of what was attached, whose state dict is mostly asked for by that of the whole."""

    attachments: list[Attachment]
    gather: Callable[[Tensor], Tensor] | None
    inner: bool = False
    told: set[str] = field(default_factory=set)

    @property
    def mode(self) -> str:
        return _asked.get() or self.attachments[0].config.deslo.state_dict

    def say_once(self, message: str, level: int = logging.INFO) -> None:
        if message not in self.told:
            self.told.add(message)
            log_rank0(message, level)


_guards: MutableMapping[Any, _Guard] = WeakKeyDictionary()  # copies of a model, such as moving averages, are not in it
# what state dicts were given: an inner module's is not averaged again in the outer one's
_given = WeakTensorKeyDictionary()
_own: ContextVar[str] = ContextVar("one_replica", default="")  # whose own state is asked for: "", "weights", or "all"
_asked: ContextVar[str] = ContextVar("asked", default="")  # in place of ``deslo.state_dict``, if anything is
_copies_told: set[str] = set()


@contextmanager
def local_state_dict(what: str = "all") -> Iterator[None]:
    """Inside, ``state_dict()`` gives this replica's own state, as it would without us; ``what`` "weights": of modules
    alone."""
    token = _own.set(what)
    try:
        yield
    finally:
        _own.reset(token)


@contextmanager
def state_dict_as(mode: str) -> Iterator[None]:
    """Inside, ``state_dict()`` does what ``deslo.state_dict: mode`` would: for a framework's save, of which it is known
    which ranks make it."""
    token = _asked.set(mode)
    try:
        yield
    finally:
        _asked.reset(token)


def refuse_one_replica(
    attachment: Attachment, *owners: Owner, gather: Callable[[Tensor], Tensor] | None = None
) -> None:
    """From now on ``state_dict()`` of ``owners`` does what ``deslo.state_dict`` says while replicas differ, and by
    default raises ``ConfigError``. ``gather`` makes a parameter whole where a framework, not a DTensor, shards it;
    collective."""
    if attachment.topology.replicas == 1:
        return
    averaging, mode = attachment.averaging, attachment.config.deslo.state_dict
    if mode == "last_average" and averaging.kept is None:
        if gather is not None:
            raise ConfigError(
                "deslo.state_dict",
                '"refuse" or "averaged" with DeepSpeed',
                '"last_average"',
                "change it; engine.save_16bit_model and engine.save_checkpoint write the average of all replicas",
            )
        averaging.kept = LastAverage(bool(attachment.config.optimizer and attachment.config.optimizer.outer_optimizer))
        averaging.keep()
    new = [each for owner in owners for each in _parts(owner) if each not in _guards]
    for owner in owners:
        for each in _parts(owner):
            _guards.setdefault(each, _Guard([], gather, inner=each is not owner)).attachments.append(attachment)
    for owner in new:
        owner.register_state_dict_pre_hook(_before)
        if isinstance(owner, torch.optim.Optimizer):
            owner.register_state_dict_post_hook(_give_states)
        else:
            owner.register_state_dict_post_hook(_give_weights)
    if any(isinstance(owner, nn.Module) for owner in new):
        log_rank0(_announcement(attachment))


def _parts(owner: Owner) -> Iterator[Owner]:
    """``owner`` and every module in it that holds parameters or buffers: wrappers, the plain model inside, its
    parts."""
    yield owner
    if isinstance(owner, nn.Module):
        holders = (
            module for module in owner.modules() if next(chain(module.parameters(), module.buffers()), None) is not None
        )
        yield from (module for module in holders if module is not owner)


def _announcement(attachment: Attachment) -> str:
    kept = attachment.averaging.kept
    recipes = {
        "refuse": "state_dict() raises while replicas differ. To save, call deslo_plugin.save(path, model), or "
        "averaged_state_dict(model) for the weights, on every rank; or set deslo.state_dict: "
        '"averaged" where every rank calls state_dict(), "last_average" where rank 0 does alone',
        "averaged": "state_dict() gives the average of all replicas while they differ: call it on every rank, never on "
        "one alone",
        "last_average": "state_dict() of the model gives the last average of the parameters while replicas differ, on "
        f"any rank alone: {kept.nbytes if kept else 0:,} bytes of each rank's host memory, copied at each of these "
        "averages",
    }
    return f"deslo: {recipes[attachment.config.deslo.state_dict]}"


def _differs(owner: Owner, guard: _Guard) -> bool:
    own = _own.get()
    return own != "all" and not (own and isinstance(owner, nn.Module)) and guard.attachments[0].averaging.diverged


def _before(owner: Owner, prefix: str = "", *_: Any) -> None:
    guard = _guards.get(owner)
    if guard is None:
        return None if prefix else _tell_of_copy(owner)
    if guard.mode != "refuse" or not _differs(owner, guard):
        return
    raise ConfigError(
        f"{type(owner).__name__}.state_dict()",
        "one model",
        f"one of {guard.attachments[0].topology.replicas} replicas, which differ between averages",
        "on EVERY rank, so not inside `if rank == 0:`, call deslo_plugin.save(path, model), or "
        "averaged_state_dict(model) for the "
        'weights alone and write them on rank 0, or deslo_plugin.sync_replicas(model) before this; or set "deslo": '
        '{"state_dict": '
        '"averaged"} if every rank makes this call, "last_average" if rank 0 makes it alone; with '
        "deslo_plugin.local_state_dict(): gives this replica's own",
    )


def _tell_of_copy(owner: Owner) -> None:
    kind = type(owner).__name__
    if not _own.get() and kind not in _copies_told and dist.is_initialized() and dist.get_world_size() > 1:
        _copies_told.add(kind)
        log_rank0(
            f"deslo: state_dict() of a copy of the model ({kind}) gives what this replica has made of it, such as its "
            "own moving average; the mean of all replicas' is deslo_plugin.averaged_state_dict(model, of=copy), on "
            "every rank",
            logging.WARNING,
        )


def _give_weights(owner: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """In place of this replica's weights in ``state``, those that ``deslo.state_dict`` says."""
    guard = _guards.get(owner)
    if guard is None or (guard.inner and prefix) or not _differs(owner, guard):
        return  # a part leaves it to the whole, which asks its parts with a prefix
    with local_state_dict():
        live = {
            prefix + name: value for name, value in owner.state_dict(keep_vars=True).items() if averages(name, value)
        }
    live = {
        name: value for name, value in live.items() if isinstance(state.get(name), Tensor) and state[name] not in _given
    }
    if guard.mode == "last_average":
        state |= _last(owner, guard, live)
    elif live:
        with guard.attachments[0].together(f"{type(owner).__name__}.state_dict()"), torch.no_grad():
            means = {id(value): _mean(value, guard) for value in {id(value): value for value in live.values()}.values()}
        state |= {name: means[id(value)] for name, value in live.items()}
        guard.say_once("deslo: state_dict() gives the average of all replicas, its weights on the CPU")
    _given.update({state[name]: True for name in live})


def _mean(value: Tensor, guard: _Guard) -> Tensor:
    attachment = guard.attachments[0]
    if hasattr(value, "to_local"):
        return mean_shard(value, attachment.groups)
    return mean_of((guard.gather or whole)(value), attachment.peers, value.dtype)


def last_average(model: nn.Module, attachments: list[Attachment], named: Mapping[str, Any]) -> dict[str, Any]:
    """``named``, with the last average of each tensor of the model that has one, sharded as it is. Sends nothing.
    Raises ``ConfigError`` where nobody keeps it, or another state was loaded since."""
    if any(attachment.averaging.kept is None for attachment in attachments):
        raise ConfigError(
            "averaged_state_dict(model)",
            '"deslo": {"state_dict": "last_average"} with a torchft manager, by which each rank keeps the last average',
            '"refuse"',
            "set it; no replica can ask the others for an average at will",
        )
    live = {name: value for name, value in named.items() if averages(name, value)}
    return {**named, **_last(model, _Guard(attachments, None), live)}


def _last(owner: nn.Module, guard: _Guard, live: dict[str, Tensor]) -> dict[str, Tensor]:
    keepers = [require(attachment.averaging.kept) for attachment in guard.attachments]
    found, steps = {}, set()
    for name, value in live.items():
        kept = next(filter(None, (keeper.of(value) for keeper in keepers)), None)
        if kept is not None:
            found[name] = _like(value, kept.copy.clone())
            steps |= {kept.steps} if value.requires_grad else set()
        elif any(keeper.forgot(value) for keeper in keepers):
            raise ConfigError(
                f"{type(owner).__name__}.state_dict()",
                f"an average of {name} to give (deslo.state_dict)",
                "none since another state was loaded",
                "call it after the next average of the parameters, or deslo_plugin.save(path, model) on every rank",
            )
        elif value.requires_grad:
            guard.say_once(
                f"deslo: state_dict() gives this replica's own {name}: no attached optimizer steps it", logging.WARNING
            )
    if steps:
        when = f"step {min(steps)}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}"
        guard.say_once(
            f"deslo: state_dict() gives the average of all replicas after {when}; this replica is at step "
            f"{guard.attachments[0].steps}"
        )
    return found


def _like(value: Tensor, own: Tensor) -> Tensor:
    """``own`` as the shard of a DTensor like ``value``, or as it is."""
    if not hasattr(value, "to_local"):
        return own
    shard: Any = value.detach()
    own = own.to(shard.to_local().device)
    return type(shard).from_local(own, shard.device_mesh, shard.placements, shape=shard.shape, stride=shard.stride())


def _give_states(owner: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """In place of this replica's momenta in ``state``, their average; or a word that they are its own."""
    guard = _guards.get(owner)
    if guard is None or not _differs(owner, guard):
        return
    if guard.mode == "last_average":
        guard.say_once(
            f"deslo: state_dict() of {type(owner).__name__} gives this replica's own momenta, beside the last average "
            "of the parameters; deslo_plugin.save(path, model), on every rank, saves one consistent state",
            logging.WARNING,
        )
        return
    attachment, states = guard.attachments[0], sorted(state["state"].items())
    with attachment.together(f"{type(owner).__name__}.state_dict()"), torch.no_grad():
        held = {
            (key, index): value for index, of_param in states for key, value in of_param.items() if _has_mean(value)
        }
        check_same_on_all_ranks(
            f"{type(owner).__name__}.state_dict() state",
            {f"{key} of parameter {index}": tuple(value.shape) for (key, index), value in held.items()},
            do="call deslo_plugin.save(path, model), which creates what a rank has not",
            group=attachment.peers,
        )
        state["state"] = {index: dict(of_param) for index, of_param in state["state"].items()}
        for key, of_key in groupby(sorted(held), key=lambda name: name[0]):
            names = list(of_key)
            means = attachment.averaging.means("state_dict", local([held[name] for name in names]))
            for (_, index), mean in zip(names, means):
                value = held[key, index]
                state["state"][index][key] = _like(value, mean.to("cpu", value.dtype))


def _has_mean(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
