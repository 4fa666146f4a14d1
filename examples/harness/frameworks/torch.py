"""No wrapper at all: every rank is a replica, and nothing leaves it but averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import ddp, native
from .job import Job


def start(model: nn.Module, config: Mapping[str, Any], replica_size: int) -> Job:
    """The bare model. Synchronous training needs someone to reduce gradients: there it is DDP."""
    if "deslo" not in config:
        return ddp.start(model, config, replica_size)
    device = native.join()
    return native.start(model.to(device), config, device)
