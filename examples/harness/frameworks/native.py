"""What DDP, FSDP2 and plain torch share: all but how the model is wrapped and how gradients are held back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from deslo_plugin import DesLoc, attach, averaged_state_dict
from deslo_plugin.attachment import Attachment

from .blocks import optimizer_for, schedule_for
from .job import Batch, Job, own_device


def join() -> torch.device:
    """Joins the other ranks; the device of this one."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def start(
    model: nn.Module,
    config: Mapping[str, Any],
    device: torch.device,
    hold: Callable[[], AbstractContextManager[object]] = nullcontext,
    **where: Any,
) -> Job:
    """Trains `model`, wrapped already and on `device`.

    Args:
        hold: a context in which a backward reduces no gradient, for all micro batches but the last.
        where: what `attach` must be told of the replicas, if the model does not show it.
    """
    optimizer = optimizer_for(model, config)
    deslo = None
    if "deslo" in config:  # the one line that a script adds; a DesLoc has read the blocks already
        deslo = attach(model, optimizer, None if isinstance(optimizer, DesLoc) else config, **where)
    schedule, clip = schedule_for(optimizer, config), config.get("gradient_clipping", 0.0)

    def step(batches: Sequence[Batch]) -> Tensor:
        for number, (tokens, targets) in enumerate(batches, 1):
            with hold() if number < len(batches) else nullcontext():
                loss = model(tokens, targets)
                (loss / len(batches)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)  # the norm of the replica's gradient, not of all ranks'
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return loss.detach()

    return Job(device, step, lambda: weights(model, deslo), deslo)


def weights(model: nn.Module, deslo: Attachment | None) -> Mapping[str, Tensor]:
    """The mean of all replicas, or the one model of synchronous training; whole parameters under plain names;
    collective."""
    if deslo:
        return averaged_state_dict(model)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
