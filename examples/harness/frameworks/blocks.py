"""What DeepSpeed reads from its JSON, for the frameworks that do not: the optimizer and the lr schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from deslo_plugin import DesLoc

READ = frozenset(
    {
        "optimizer",
        "deslo",
        "scheduler",
        "gradient_clipping",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    }
)
WITHOUT_EFFECT = frozenset({"comment", "zero_optimization", "steps_per_print"})
"""Of no meaning outside DeepSpeed, and of no influence on a loss inside it."""


def refuse_unread(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that would change the training under DeepSpeed, and here would not."""
    if unread := sorted(config.keys() - READ - WITHOUT_EFFECT):
        raise ValueError(
            f"--config: expected only keys that every framework has, got {', '.join(unread)}; "
            "remove them, or train with --framework deepspeed"
        )


def param_groups(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """The parameters, in one group; beside a rule of matrices the embedding in one of its own, with the other rule."""
    params = config["optimizer"]["params"]
    if params.get("rule") != "muon":
        return model.parameters()
    matrices = [param for name, param in model.named_parameters() if name != "embedding"]
    return [{"params": matrices}, {"params": [model.embedding], "rule": params.get("beside", {}).get("rule", "adam")}]


def optimizer_for(model: nn.Module, config: Mapping[str, Any]) -> Optimizer:
    """The optimizer of the "optimizer" block: DesLoc, or torch's AdamW. Raises ValueError for another."""
    block = config["optimizer"]
    if block["type"] == "DesLoc":
        return DesLoc(param_groups(model, config), config)
    if block["type"] == "AdamW":
        # torch_adam is how DeepSpeed is asked for this very optimizer, in place of its own
        return torch.optim.AdamW(model.parameters(), **{k: v for k, v in block["params"].items() if k != "torch_adam"})
    raise ValueError(
        f'optimizer.type: expected "DesLoc" or "AdamW", got {block["type"]!r}; or use --framework deepspeed'
    )


def schedule_for(optimizer: Optimizer, config: Mapping[str, Any]) -> LambdaLR:
    """The lr of the "scheduler" block, to be stepped once per optimizer step; without the block it stays.

    Raises ValueError for a type other than WarmupCosineLR.
    """
    block = config.get("scheduler")
    if block is None:
        return LambdaLR(optimizer, lambda _: 1.0)
    if block["type"] != "WarmupCosineLR":
        raise ValueError(
            f'scheduler.type: expected "WarmupCosineLR", got {block["type"]!r}; or use --framework deepspeed'
        )
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, **block["params"]))


def warmup_cosine(
    step: int,
    *,
    total_num_steps: int,
    warmup_min_ratio: float = 0.0,
    warmup_num_steps: int = 1000,
    cos_min_ratio: float = 1e-4,
    warmup_type: str = "log",
) -> float:
    """The lr of 0-based step `step` as a part of the peak lr, to the bit as DeepSpeed's WarmupCosineLR has it.

    DeepSpeed's first step comes before its schedule has begun and takes lr 0; the schedule's step 0 is the second.
    """
    if step == 0:
        return 0.0
    step, warmup = step - 1, max(2, warmup_num_steps)
    if step < warmup:
        risen = step / warmup if warmup_type == "linear" else 1.0 / math.log(warmup) * math.log(step + 1)
        return warmup_min_ratio + risen * (1.0 - warmup_min_ratio)
    done = min(1.0, (step - warmup + 1) / max(1, total_num_steps - warmup))
    return cos_min_ratio + (1.0 - cos_min_ratio) * ((1 + math.cos(math.pi * done)) / 2)
