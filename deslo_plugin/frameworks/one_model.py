"""Refuses a state dict of one replica where it would be taken for the model.

Between averages every replica has its own parameters and momenta. Whatever saves them by ``state_dict()``, be it
``torch.save``, ``torch.distributed.checkpoint`` or a trainer, would write one replica, or a mixture of several.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from deslo_plugin.frameworks.attachment import Attachment
from deslo_plugin.strict import ConfigError

_owner: MutableMapping[Any, Attachment] = WeakKeyDictionary()  # copies of a model, such as moving averages, are not in it
_wanted: ContextVar[bool] = ContextVar("one_replica", default=False)


@contextmanager
def one_replica() -> Iterator[None]:
    """Inside, ``state_dict()`` gives this replica's own state, as it would without us."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def refuse_one_replica(attachment: Attachment, *owners: nn.Module | torch.optim.Optimizer) -> None:
    """From now on ``state_dict()`` of ``owners`` raises ``ConfigError`` while replicas differ, and so does that of every module
    in them that holds parameters or buffers: wrappers, the plain model inside, its parts."""
    if attachment.topology.replicas == 1:
        return
    for owner in (each for owner in owners for each in _parts(owner) if each not in _owner):
        _owner[owner] = attachment
        owner.register_state_dict_pre_hook(_refuse)


def _parts(owner: nn.Module | torch.optim.Optimizer) -> Iterator[nn.Module | torch.optim.Optimizer]:
    yield owner
    if isinstance(owner, nn.Module):
        holders = (module for module in owner.modules() if next(chain(module.parameters(), module.buffers()), None) is not None)
        yield from (module for module in holders if module is not owner)


def _refuse(owner: nn.Module | torch.optim.Optimizer, *_: Any) -> None:
    attachment = _owner.get(owner)
    if attachment is None or _wanted.get() or not attachment.averaging.diverged:
        return
    raise ConfigError(
        f"{type(owner).__name__}.state_dict()", "one model", f"one of {attachment.topology.replicas} replicas, which differ "
        "between averages", "call deslo_plugin.save(path, model), or averaged_state_dict(model) for the weights alone, or "
        "deslo_plugin.meet(model) first; with deslo_plugin.one_replica(): gives this replica's own",
    )
