"""DistributedDataParallel: gradients are reduced among the `replica_size` ranks of a replica, at every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import native
from .job import Job


def start(model: nn.Module, config: Mapping[str, Any], replica_size: int) -> Job:
    """DDP over all ranks; `attach` reads the size of a replica from the config and reduces gradients inside it."""
    device = native.join()
    ddp = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    return native.start(ddp, config, device, hold=ddp.no_sync)
