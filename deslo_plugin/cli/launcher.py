"""The world a command runs in: the processes of torchrun, or this one alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import typer

from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank, make_groups
from deslo_plugin.comm.topology import make_topology
from deslo_plugin.config.schema import DesloConfig

TIMEOUT_S = 120.0  # of a command's own collectives


@contextmanager
def world() -> Iterator[torch.device]:
    """Joins the processes of the launcher, if one started this; gives the device that this rank trains on.

    Leaves through ``leave``, never past it.
    """
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    yield device


def leave(status: int) -> None:
    """Ends the command with ``status``, the worst of all ranks: all wait for each other, so that none is cut off."""
    if not dist.is_initialized():
        raise typer.Exit(status)
    status = max(all_gather_by_rank(status).values())
    sys.stdout.flush()
    sys.stderr.flush()
    dist.barrier()
    os._exit(status)  # gloo's threads may abort a process that takes itself apart in order


def groups_of(deslo: DesloConfig) -> Groups:
    """The groups that a job with this ``deslo`` block makes in this world."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    topology = make_topology(deslo, world_size=dist.get_world_size(), rank=dist.get_rank(), local_world_size=local)
    return make_groups(topology, min(deslo.timeout_s, TIMEOUT_S))
