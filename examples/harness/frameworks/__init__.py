"""The main job under each framework. One file per framework shows what a script of that framework writes for its
replicas:

    deepspeed.py    a JSON, and nothing else
    ddp.py          DistributedDataParallel, replicas of one rank or of several
    fsdp.py         FSDP2 on a mesh of replicas and shards
    torch.py        no wrapper, every rank a replica
    accelerate.py   an Accelerator with DDP underneath

Each has `start(model, config, replica_size)`. Without a "deslo" block it trains synchronously, as that framework does
by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from .job import Job


def start(framework: str, model: nn.Module, config: Mapping[str, Any], replica_size: int) -> Job:
    """Wraps `model`, the same on every rank, as `framework` does and `config` says; `replica_size` is in ranks."""
    # Only the one that is asked for is imported: no other needs to be installed.
    return import_module(f".{framework}", __name__).start(model, config, replica_size)
