"""The job of jobs.py under DDP, FSDP2 and plain torch, run on every rank of a ``Processes`` world."""

import contextlib
import logging
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.device import DEVICE
from tests.support.jobs import batch, loss_of, net, two_groups
from tests.support.theory import ACCUMULATION, CLIP

Wrap = Callable[..., tuple[nn.Module, dict[str, Any]]]


def plain(model: nn.Module) -> tuple[nn.Module, dict]:
    return model, {}


def ddp(model: nn.Module, **options: Any) -> tuple[nn.Module, dict]:
    return DistributedDataParallel(model, **options), {}


@cache
def mesh_of(shape: tuple, names: tuple) -> DeviceMesh:
    """One for all jobs of a process: every group keeps threads and sockets."""
    return init_device_mesh(DEVICE.type, shape, mesh_dim_names=names)


def fsdp(
    model: nn.Module, shape: tuple = (2, 2), names: tuple = ("replicate", "shard"), on: Any = "shard", **options: Any
):
    """Every layer and the whole sharded on dimension(s) ``on`` of a mesh of all ranks."""
    mesh = mesh_of(shape, names)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh[on], **options)
    return fully_shard(model, mesh=mesh[on], **options), {"mesh": mesh}


def hsdp(model: nn.Module, **options: Any) -> tuple[nn.Module, dict]:
    """Wrapped on both dimensions, to be re-pointed; nothing said about the mesh."""
    return fsdp(model, on=("replicate", "shard"), **options)[0], {}


def hsdp_inside(model: nn.Module, shape: tuple = (2, 2, 1)) -> tuple[nn.Module, dict]:
    """Three dimensions: averages across the first, HSDP over the other two."""
    model, options = fsdp(model, shape, ("sites", "nodes", "shard"), ("nodes", "shard"))
    return model, options | {"replicate": "sites"}


WRAPS = {"plain": plain, "ddp": ddp, "fsdp": fsdp, "hsdp": hsdp, "hsdp inside": hsdp_inside}


def stock_groups(model: nn.Module) -> list[dict]:
    """The two groups for an optimizer that has no periods of its own."""
    return [{key: value for key, value in group.items() if key != "sync_every"} for group in two_groups(model)]


def attached(wrap: str, blocks: dict, model: nn.Module | None = None, optimizer: Any = None, **options: Any) -> tuple:
    """(model, optimizer, attachment) of this rank."""
    import deslo_plugin

    logging.getLogger("deslo_plugin").setLevel(logging.ERROR)
    model, where = WRAPS[wrap](model or net(), **options)
    if optimizer is None:
        optimizer, config = deslo_plugin.DesLoc(two_groups(model), blocks), None
    else:
        optimizer, config = optimizer(model), blocks
    return model, optimizer, deslo_plugin.attach(model, optimizer, config, **where)


def train(model: nn.Module, optimizer: Any, steps: range, clip: float | None = CLIP) -> list[float]:
    """Accumulates, clips and steps as a user's loop would; the losses."""
    losses = []
    for step in steps:
        for micro in range(ACCUMULATION):
            last = micro == ACCUMULATION - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            quiet = (
                model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
            )
            with quiet:
                loss = loss_of(model, batch(dist.get_rank(), step, micro))
                (loss / ACCUMULATION).backward()
            losses.append(float(loss.detach()))
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone().flatten()


def states_of(model: nn.Module, optimizer: Any, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """state -> parameter name -> flat tensor of this rank's replica."""
    params = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    out = {"params": {name: whole(p) for name, p in params.items()}}
    for state in names:
        out[state] = {
            name: whole(optimizer.state[p][state]) for name, p in params.items() if state in optimizer.state[p]
        }
    return out


def run(
    wrap: str, blocks: dict, steps: int, model: Any = None, optimizer: Any = None, options: dict | None = None
) -> dict:
    """Trains and returns this replica's states, the meter, and the plan's figures."""
    model, optimizer, attachment = attached(wrap, blocks, model and model(), optimizer, **(options or {}))
    losses = train(model, optimizer, range(steps))
    meter, plan = attachment.stats, attachment.plan
    moments = [state for group in optimizer.param_groups for state in group["sync_every"] if state != "params"]
    return {
        "states": states_of(model, optimizer, list(dict.fromkeys(moments))),
        "losses": losses,
        "bytes": dict(meter.bytes),
        "planned": {state: sum(plan.bytes_at(t).get(state, 0) for t in range(steps)) for state in meter.bytes},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "skipped": meter.skipped_steps,
        "banner": plan.describe(),
    }


def raises(wrap: str, blocks: dict, steps: int = 0, options: dict | None = None, optimizer: Any = None) -> str:
    """The message of the error that attaching (and ``steps`` steps) raises on this rank, or "no error"."""
    try:
        run(wrap, blocks, steps, None, optimizer, options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def one_replica_ahead(wrap: str, blocks: dict, free: int, folder: str, options: dict) -> list[float]:
    """Replica 0 takes ``free`` steps while all other replicas wait for a file that it writes then; then all go on.

    If anything crossed replicas in those steps, replica 0 would wait for it for ever.
    """
    model, optimizer, attachment = attached(wrap, blocks, **options)
    topology, done = attachment.topology, Path(folder)
    if topology.replica == 0:
        losses = train(model, optimizer, range(free))
        (done / str(dist.get_rank())).touch()
    else:
        deadline = time.monotonic() + 60
        while len(list(done.iterdir())) < topology.replica_size:
            assert time.monotonic() < deadline, "replica 0 waited for something from another replica"
            time.sleep(0.01)
        losses = train(model, optimizer, range(free))
    return losses + train(model, optimizer, range(free, free + 2))


def ddp_of_a_replica(model: nn.Module) -> tuple[nn.Module, dict]:
    group, _ = dist.new_subgroups(group_size=2)
    return DistributedDataParallel(model, process_group=group), {}


def hooked_ddp(model: nn.Module) -> tuple[nn.Module, dict]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    wrapped, options = ddp(model)
    wrapped.register_comm_hook(None, fp16_compress_hook)
    return wrapped, options


def fsdp_of_the_world(model: nn.Module) -> tuple[nn.Module, dict]:
    return fsdp(model, (4,), ("shard",))[0], {}


WRAPS |= {"fsdp of the world": fsdp_of_the_world, "ddp of a replica": ddp_of_a_replica, "ddp with a hook": hooked_ddp}
