"""What the training loop sees of a framework, and where its rank computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deslo_plugin.attachment import Attachment

Batch = tuple[Tensor, Tensor]
"""Tokens and targets, (micro batch, context) int64 each, on the job's device."""


@dataclass(frozen=True)
class Job:
    """A model in training, as one rank sees it.

    `step` takes the micro batches of one optimizer step and returns the loss of the last of them, () without a graph.
    `weights` gives the model to validate, the mean of all replicas: whole parameters by name; collective. `deslo` is
    None where training is synchronous. `gradient_dtype` is what a synchronous step sends.
    """

    device: torch.device
    step: Callable[[Sequence[Batch]], Tensor]
    weights: Callable[[], Mapping[str, Tensor]]
    deslo: Attachment | None
    gradient_dtype: torch.dtype = torch.float32


def local_ranks() -> int:
    """The ranks on this node, as torchrun or the deepspeed launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"])


def own_device() -> torch.device:
    """This rank's own GPU, or the CPU where ranks would have to share one, which NCCL refuses."""
    if torch.cuda.device_count() < local_ranks():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
