"""What one device hides from a CPU, run on every rank of a ``Processes`` world: whose step is called, and which groups
there are."""

import contextlib
import logging
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.support import jobs, torch_jobs

PERIODS = {"params": 2, "exp_avg": 2, "exp_avg_sq": 2}


def _quiet() -> None:
    logging.getLogger("deslo_plugin").setLevel(logging.ERROR)


def _optimizer(kind: str, model: nn.Module) -> tuple[torch.optim.Optimizer, dict | None]:
    """It, and the config that ``attach`` wants beside it."""
    import deslo_plugin

    deslo = {"replica_size": 1, "average_at": "after_step"}
    if kind == "DesLoc":
        params = {"lr": 1e-2, "sync_every": PERIODS}
        return deslo_plugin.DesLoc(model.parameters(), {"optimizer": {"params": params}, "deslo": deslo}), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=kind == "fused AdamW")
    return optimizer, {"deslo": deslo | {"sync_every": PERIODS}}


def scaled_by_accelerate(kind: str, way: str, overflow: int | None = None) -> dict:
    """Four steps through Accelerate beside a GradScaler, which it offers on GPUs only; the gradients of replica 1
    overflow at step ``overflow``. ``way``: whether the wrapper, or what is in it, is attached, or ``prepare`` did
    all."""
    import deslo_plugin
    from tests.support.accelerate_jobs import accelerator_for

    _quiet()
    accelerator, model, scaler = accelerator_for("ddp"), jobs.net(), torch.amp.GradScaler("cpu", init_scale=8.0)
    made, config = _optimizer(kind, model)
    if way == "prepare":
        accelerator.scaler = scaler
        deslo_plugin.attach_accelerator(accelerator, config)
        model, optimizer = accelerator.prepare(model, made)
        attachment = accelerator.deslo
    else:
        from accelerate.optimizer import AcceleratedOptimizer

        optimizer = AcceleratedOptimizer(made, scaler=scaler)
        attachment = deslo_plugin.attach(model, optimizer if way == "wrapper" else made, config)
    shared, moved = [], []
    for step in range(4):
        before = [p.detach().clone() for p in made.param_groups[0]["params"]]
        loss = jobs.loss_of(model, jobs.batch(dist.get_rank(), step, 0))
        if (dist.get_rank(), step) == (1, overflow):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        optimizer.step()
        made.zero_grad()
        states = [made.state[p] | {"params": p.detach()} for p in made.param_groups[0]["params"]]
        flat = torch.cat([state[name].flatten() for state in states for name in ("params", "exp_avg", "exp_avg_sq")])
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, made.param_groups[0]["params"])))
        everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, flat)
        shared.append(all(torch.equal(each, everyone[0]) for each in everyone))
    return {
        "steps": attachment.steps,
        "equal after": shared,
        "moved": moved,
        "events": dict(attachment.stats.events),
        "skipped": attachment.stats.skipped_steps,
        "finite": bool(flat.isfinite().all()),
    }


def join_more_groups(members: list[int], local: bool) -> None:
    """From now on ``members`` are in a process group that others are not in; ``local``: the others know nothing of
    it. (Where a group is destroyed, torch may give its successors names that are taken.)"""
    if not local or dist.get_rank() in members:
        dist.new_group(members, use_local_synchronization=local)


def beside_other_groups(members: list[int], local: bool, wrap: str, blocks: dict, steps: int) -> dict:
    """The job of ``wrap`` attached while ranks are in unequally many groups."""
    join_more_groups(members, local)
    return jobs.run(blocks, steps) if wrap == "deepspeed" else torch_jobs.run(wrap, blocks, steps)


def attach_a_subset(timeout_s: float, members: list[int] | None = None, bound: bool = False) -> str:
    """What attaching ranks 0 and 1 alone says there, with ``members`` in a group more; on the others "". ``bound``: as
    ``init_process_group`` with a device_id."""
    import deslo_plugin

    _quiet()
    group = dist.new_group([0, 1])
    if members:
        join_more_groups(members, False)
    try:
        if dist.get_rank() > 1:
            return ""
        model = jobs.net()
        optimizer, config = _optimizer("AdamW", model)
        config["deslo"]["timeout_s"] = timeout_s  # groups of its own
        if bound:
            dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
        try:
            deslo_plugin.attach(model, optimizer, config, process_group=group)
        except ValueError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            dist.group.WORLD.bound_device_id = None
        return "attached"
    finally:
        dist.barrier()


def unreachable(which: str) -> str:
    """What ``open_groups`` says where the group named ``which`` cannot be reached."""
    from deslo_plugin.comm import process_groups

    _, _, attachment = torch_jobs.attached("ddp", _blocks(replica_size=2, timeout_s=60.0))
    groups, all_reduce = attachment.groups, dist.all_reduce
    broken = getattr(groups, which)

    def send(tensor: torch.Tensor, *arguments: Any, group: Any = None, **options: Any) -> Any:
        if group is broken:
            raise RuntimeError("Connection refused by 10.0.0.7\nand a stack of C++")
        return all_reduce(tensor, *arguments, group=group, **options)

    with mock.patch.object(dist, "all_reduce", send):
        try:
            process_groups.open_groups(groups, torch.device("cpu"))
        except ValueError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            dist.barrier()
    return "reached"


def _blocks(**deslo: Any) -> dict:
    return {"optimizer": {"params": {"lr": 1e-2, "sync_every": PERIODS}}, "deslo": {"replica_size": 1, **deslo}}


def small_collectives(flags: list[bool], values: list[float]) -> dict:
    """``any`` and ``total`` over a replica of all four ranks, each with this rank's part; and what was sent for it."""
    from deslo_plugin.comm.process_groups import make_groups
    from deslo_plugin.comm.replica_transport import ReplicaTransport
    from deslo_plugin.comm.topology import contiguous

    rank, calls = dist.get_rank(), []
    transport = ReplicaTransport(make_groups(contiguous(dist.get_world_size(), rank, 4), 60.0), timeout_s=60.0)

    def counted(name: str) -> Any:
        original = getattr(dist, name)
        return lambda *arguments, **options: (calls.append(name), original(*arguments, **options))[1]

    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier")
    with contextlib.ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(dist, name, counted(name)))
        said, of_any = transport.any(flags[rank]), len(calls)
        total, of_total = transport.total(values[rank]), len(calls) - of_any
    return {"any": said, "total": total.hex(), "calls": (of_any, of_total)}


def divided_average(divisor: int) -> tuple[list[float], list[float]]:
    """A chunk that the ranks of a replica hold alike and split between them: what arrives, and what must."""
    from deslo_plugin.comm.process_groups import make_groups
    from deslo_plugin.comm.replica_transport import ReplicaTransport
    from deslo_plugin.comm.topology import contiguous

    rank, size = dist.get_rank(), dist.get_world_size()
    groups = make_groups(contiguous(size, rank, divisor), 60.0)
    transport = ReplicaTransport(groups, timeout_s=60.0, copies=groups.shard)
    replicas = [torch.arange(8.0) + 100 * replica for replica in range(size // divisor)]
    chunk = replicas[rank // divisor].clone()
    transport.start(chunk).wait()
    return chunk.tolist(), torch.stack(replicas).mean(0).tolist()


def sharded_in_part(how: str, blocks: dict, steps: int) -> dict:
    """FSDP2 over the world's second dimension with a layer outside of it, or blocks sharded without their root."""
    mesh = torch_jobs.mesh_of((2, 2), ("replicate", "shard"))

    def wrap(model: nn.Module) -> tuple[nn.Module, dict]:
        for layer in [model[0]] if how == "head outside" else [model[0], model[2]]:
            fully_shard(layer, mesh=mesh["shard"])
        return model, {"mesh": mesh}

    with mock.patch.dict(torch_jobs.WRAPS, {how: wrap}):
        model, optimizer, _ = torch_jobs.attached(how, blocks)
        gradients, outside = [], [p for p in model.parameters() if not hasattr(p, "placements")]
        for step in range(steps):
            model.zero_grad()
            jobs.loss_of(model, jobs.batch(dist.get_rank(), step, 0)).backward()
            for param in outside:  # inside a replica that is the script's own business
                dist.all_reduce(param.grad, dist.ReduceOp.AVG, group=mesh["shard"].get_group())
            gradients.append(torch.cat([torch_jobs.whole(p.grad) for p in model.parameters()]))
            optimizer.step()
        params = torch.cat([torch_jobs.whole(p) for p in model.parameters()])
    return {"gradients": gradients, "params": params}


def gradients_of_all(params: torch.Tensor | None, step: int) -> torch.Tensor:
    """The mean over four ranks of the gradient at ``params``, on one rank without any framework."""
    model = jobs.net()
    if params is not None:
        nn.utils.vector_to_parameters(params, model.parameters())
    for rank in range(4):
        (jobs.loss_of(model, jobs.batch(rank, step, 0)) / 4).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])
