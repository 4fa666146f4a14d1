"""FSDP2: every replica shards itself over its own ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from . import native
from .job import Job


def start(model: nn.Module, config: Mapping[str, Any], replica_size: int) -> Job:
    """A mesh of replicas and shards: sharded on the second dimension, averaged along the first.

    Sharded on both dimensions it is HSDP, which is synchronous.
    """
    device = native.join()
    replicas = dist.get_world_size() // replica_size
    mesh = init_device_mesh(device.type, (replicas, replica_size), mesh_dim_names=("replicate", "shard"))
    part = mesh["shard"] if "deslo" in config else mesh
    model.to(device)
    for block in model.blocks:
        fully_shard(block, mesh=part)
    fully_shard(model, mesh=part)

    @contextmanager
    def hold() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return native.start(model, config, device, hold, mesh=mesh)
