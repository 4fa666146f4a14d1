"""The job of jobs.py under DDP, FSDP2 and plain torch, run on every rank of a ``Processes`` world."""

import contextlib
import io
import logging
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.comm.step_rate import StepRate
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
        out[state] = {name: whole(optimizer.state[p][state]) for name, p in params.items()}
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


class Quantised(torch.optim.Optimizer):
    """SGD that keeps whole numbers beside its parameters, as 8-bit optimizers do."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("codes", torch.zeros_like(p, dtype=torch.int8))
                p -= group["lr"] * p.grad


def quantised(model: nn.Module) -> Quantised:
    return Quantised(model.parameters())


def raw_states(wrap: str, blocks: dict, steps: int, optimizer: Any) -> dict[str, list[Tensor]]:
    """state -> the tensor of each parameter that has it."""
    model, optimizer, _ = attached(wrap, blocks, None, optimizer)
    train(model, optimizer, range(steps))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    out = {"params": [p.detach().clone() for p in params]}
    for p in params:
        for state, value in optimizer.state[p].items():
            if value.ndim:
                out.setdefault(state, []).append(value.clone())
    return out


def muon_and_adamw(steps: int) -> dict[str, bool]:
    """Matrices by Muon, vectors by AdamW; whether each state is the same on all ranks after ``steps``."""
    import deslo_plugin

    model, _ = ddp(net())
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-2)
    common = {"replica_size": 1, "average_at": "after_step"}
    deslo_plugin.attach(model, muon, {"deslo": common | {"sync_every": {"params": 2, "momentum_buffer": 3}}})
    deslo_plugin.attach(model, adamw, {"deslo": common | {"sync_every": {"params": 2, "exp_avg": 4, "exp_avg_sq": 6}}})
    for step in range(steps):
        loss_of(model, batch(dist.get_rank(), step, 0)).backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    seen: dict[str, list[Tensor]] = {"params": [p.detach() for p in model.parameters()]}
    for optimizer in (muon, adamw):
        for states in optimizer.state.values():
            for state, value in states.items():
                if value.ndim:
                    seen.setdefault(state, []).append(value)
    equal = {}
    for state, tensors in seen.items():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [tensor.flatten().tolist() for tensor in tensors])
        equal[state] = all(other == everyone[0] for other in everyone)
    return equal


def fsdp_variant(wrap: str, variant: str, blocks: dict, steps: int) -> dict:
    """FSDP2 as people use it: policies, resharding, recomputation, compiled blocks."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    options: dict[str, Any] = {
        "cpu offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "no reshard": {"reshard_after_forward": False},
        "reshard to 1": {"reshard_after_forward": 2},
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    }.get(variant, {})

    def model() -> nn.Module:
        made = net()
        if variant == "checkpointing":
            # recomputes the activation; the names of the layers with parameters stay
            made[1] = checkpoint_wrapper(made[1])
        if variant == "compiled block":
            made[0].compile(backend="aot_eager")
        return made

    return run(wrap, blocks, steps, model, None, options)


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


def batch_norm(blocks: dict, steps: int) -> dict:
    """Whether the running statistics are the same on all ranks after the step before the average, and after it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model, optimizer, attachment = attached("ddp", blocks, model)

    def equal() -> bool:
        everyone: list[Any] = [None] * dist.get_world_size()
        norm = model.module[1]
        dist.all_gather_object(everyone, (norm.running_mean.tolist(), norm.running_var.tolist()))
        return all(each == everyone[0] for each in everyone)

    train(model, optimizer, range(steps - 1))
    before = equal()
    train(model, optimizer, range(steps - 1, steps))
    return {
        f"equal at {steps - 1}": before,
        f"equal at {steps}": equal(),
        "bytes": dict(attachment.stats.bytes),
        "tracked": int(model.module[1].num_batches_tracked),
    }


def scaled(wrap: str, stock: bool, steps: int) -> dict:
    """An fp16-style loop with a GradScaler; rank 1 overflows at step 2."""
    every = {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}
    deslo = {"replica_size": 1}
    blocks = (
        {"deslo": deslo | {"sync_every": every}}
        if stock
        else {"optimizer": {"params": {"sync_every": every}}, "deslo": deslo}
    )
    make = (lambda model: torch.optim.AdamW(model.parameters(), foreach=True)) if stock else None
    model, optimizer, attachment = attached(wrap, blocks, None, make)
    scaler, moved = torch.amp.GradScaler(DEVICE.type, init_scale=8.0), None
    for step in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        loss = loss_of(model, batch(dist.get_rank(), step, 0))
        if dist.get_rank() == 1 and step == 2:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 2:
            moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before) if p.ndim == 2)  # biases meet
    return {
        "skipped": attachment.stats.skipped_steps,
        "steps": attachment.averaging.steps,
        "moved at 2": moved,
        "bytes": dict(attachment.stats.bytes),
    }


def exported(wrap: str, blocks: dict, steps: int) -> dict:
    import deslo_plugin

    model, optimizer, _ = attached(wrap, blocks)
    train(model, optimizer, range(steps))
    state = deslo_plugin.averaged_state_dict(model)
    net().load_state_dict(state)
    return {"state": state, "own": {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}}


def copied(blocks: dict) -> bool:
    import copy
    import pickle

    model, optimizer, _ = attached("plain", blocks)
    train(model, optimizer, range(1))
    same = [torch.equal(a, b) for a, b in zip(copy.deepcopy(model).parameters(), model.parameters())]
    return all(same) and len(pickle.loads(pickle.dumps(model)).state_dict()) == len(same)


def unequal(initial: str) -> str:
    """Every rank seeds its model differently."""
    config = {"deslo": {"initial_params": initial, "replica_size": 1}}
    try:
        model, *_ = attached("plain", config, net(seed=dist.get_rank()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [p.tolist() for p in model.parameters()])
    return "equal" if all(each == everyone[0] for each in everyone) else "unequal"


def moved_internals(blocks: dict) -> str:
    """attach of an HSDP model where torch's attribute is gone."""
    import deslo_plugin.frameworks.fsdp2 as own

    def gone(*_: Any) -> None:
        raise AttributeError("'FSDPParamGroup' object has no attribute 'mesh_info'")

    original, own._point_at_shards = own._point_at_shards, gone
    try:
        return raises("hsdp", blocks)
    finally:
        own._point_at_shards = original


def misused(mistake: str, blocks: dict) -> str:
    import deslo_plugin

    rank, model = dist.get_rank(), net()
    if mistake == "different model" and rank == 3:
        model[2] = nn.Linear(8, 4)
    lr = 2e-2 if mistake == "different lr" and rank == 3 else 1e-2
    if mistake == "different config" and rank == 3:
        blocks = blocks | {"deslo": {"average_at": "after_step"}}
    stock = mistake in ("no schedule", "DesLoc config")
    optimizer = (
        torch.optim.AdamW(model.parameters())
        if stock
        else deslo_plugin.DesLoc([{"params": list(model.parameters()), "lr": lr}], blocks)
    )
    try:
        if mistake == "not attached":
            optimizer.step()
        given = mistake in ("config twice", "DesLoc config") or mistake == "config of one rank" and rank == 3
        config = blocks if given else None
        for _ in range(2):
            deslo_plugin.attach(model, optimizer, config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fewer_steps(blocks: dict) -> str:
    model, optimizer, _ = attached("plain", blocks)
    for step in range(5):
        if dist.get_rank() == 3 and step == 2:
            time.sleep(8)  # its process lives on, as one that saves or evaluates would
            return "left"
        train(model, optimizer, range(step, step + 1))
    return "no error"


def poisoned(blocks: dict, culprit: int) -> tuple[str, bool]:
    """(the error that stops this rank, whether its parameters are finite)."""
    model, optimizer, _ = attached("plain", blocks)
    for step in range(5):
        loss = loss_of(model, batch(dist.get_rank(), step, 0))
        (loss * float("nan") if dist.get_rank() == culprit and step == 1 else loss).backward()
        try:
            optimizer.step()
        except ArithmeticError as error:
            return f"{type(error).__name__}: {error}", all(bool(p.isfinite().all()) for p in model.parameters())
        optimizer.zero_grad()
    raise AssertionError("no error")


class Branch(nn.Sequential):
    """The job's net, whose last layer one may leave out."""

    def forward(self, inputs: Tensor, use_last: bool = True) -> Tensor:
        hidden = self[1](self[0](inputs))
        return self[2](hidden) if use_last else hidden[:, :3]


def unused(wrap: str, blocks: dict) -> tuple[bool, list[Tensor]]:
    """Whether the last layer moved in the warm-up although replica 0 never uses it, and all parameters."""
    options = {"find_unused_parameters": True} if wrap == "ddp" else {}
    model, optimizer, attachment = attached(wrap, blocks, Branch(*net()), **options)
    start = [whole(p) for p in model.parameters()]
    for step in range(4):
        model(batch(dist.get_rank(), step, 0)[0], use_last=attachment.topology.replica != 0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    now = [whole(p) for p in model.parameters()]
    return not torch.equal(now[-2], start[-2]), now


def missing(blocks: dict, fate: str, culprit: int, step: int) -> str:
    """What stops this rank when ``culprit`` does not come to ``step``, or dies there; other attachments are about
    too."""
    others = [attached("plain", blocks) for _ in range(2)]
    model, optimizer, _ = attached("plain", blocks)
    train(*others[0][:2], range(2))
    for now in range(20):
        if dist.get_rank() == culprit and now == step:
            if fate == "dead":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(8)  # its process lives on, as one that saves or evaluates would
            return "left"
        try:
            train(model, optimizer, range(now, now + 1))
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def batch_of(rank: int, step: int, rests: bool) -> int:
    """Different on every rank; where it ``rests``, rank 3 sees nothing in the third of every four steps."""
    return 0 if rests and rank == 3 and step % 4 == 2 else 4 * (rank + 1)


def weighted(wrap: str, blocks: dict, steps: int, rests: bool, optimizer: Any = None, batch_norm: bool = False) -> dict:
    """Trains on batches of ``batch_of`` and tells them; states, bytes and the plan's figures of this rank."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) if batch_norm else net()
    model, optimizer, attachment = attached(wrap, blocks, model, optimizer)
    rank = dist.get_rank()
    for step in range(steps):
        if not (size := batch_of(rank, step, rests)):
            attachment.skip_step()
            continue
        attachment.record_samples(size)
        loss_of(model, tuple(torch.cat([part] * (size // 2)) for part in batch(rank, step, 0))).backward()
        optimizer.step()
        optimizer.zero_grad()
    meter, plan = attachment.stats, attachment.plan
    return {
        "states": states_of(model, optimizer, []),
        "bytes": dict(meter.bytes),
        "planned": {state: sum(plan.bytes_at(t).get(state, 0) for t in range(steps)) for state in meter.bytes},
        "banner": plan.describe(),
    }


def stragglers(blocks: dict, slow: int) -> dict:
    """Step rates by replica and the log of this rank, where each step takes 100 s by its clock and 300 s on rank
    ``slow``."""
    log, now = io.StringIO(), [0.0]
    with mock.patch("deslo_plugin.comm.progress.StepRate", lambda: StepRate(clock=lambda: now[0])):
        model, optimizer, attachment = attached("plain", blocks)
    logger, handler = logging.getLogger("deslo_plugin"), logging.StreamHandler(log)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    early = attachment.step_rates()
    for step in range(40):
        now[0] += 300 if dist.get_rank() == slow else 100
        time.sleep(0.02)
        train(model, optimizer, range(step, step + 1))
    dist.barrier()
    rates = attachment.step_rates()
    dist.barrier()
    logger.removeHandler(handler)
    return {"early": early, "rates": rates, "log": log.getvalue()}
