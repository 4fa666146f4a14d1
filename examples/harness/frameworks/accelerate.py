"""Accelerate, with DDP underneath: one line before `prepare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from deslo_plugin import attach_accelerator

from .blocks import optimizer_for, schedule_for
from .job import Batch, Job, own_device
from .native import weights


def start(model: nn.Module, config: Mapping[str, Any], replica_size: int) -> Job:
    """An Accelerator that prepares model and optimizer.

    The lr schedule stays outside: a prepared one takes as many steps at once as there are ranks. So does the data,
    which Accelerate would deal out to ranks in another order than the other frameworks do.
    """
    accelerator = Accelerator(
        cpu=own_device().type == "cpu", gradient_accumulation_steps=config.get("gradient_accumulation_steps", 1)
    )
    optimizer = optimizer_for(model, config)
    schedule, clip = schedule_for(optimizer, config), config.get("gradient_clipping", 0.0)
    if "deslo" in config:
        attach_accelerator(accelerator, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    deslo = getattr(accelerator, "deslo", None)

    def step(batches: Sequence[Batch]) -> Tensor:
        for tokens, targets in batches:
            with accelerator.accumulate(model):
                loss = model(tokens, targets)
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        return loss.detach()

    return Job(accelerator.device, step, lambda: weights(model, deslo), deslo)
