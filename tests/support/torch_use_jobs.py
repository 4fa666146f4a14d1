"""What a script of DDP, FSDP2 or plain torch does beside training, run on every rank of a ``Processes`` world."""

import io
import logging
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deslo_plugin.comm.step_rate import StepRate
from tests.support.device import DEVICE
from tests.support.jobs import batch, loss_of, net
from tests.support.torch_jobs import attached, ddp, run, states_of, train, whole


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
