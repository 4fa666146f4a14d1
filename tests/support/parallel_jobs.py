"""Models that a replica's ranks share in other ways than DDP and FSDP2 alone, and what they must come to by the
oracle."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.support import oracle
from tests.support.theory import CLIP
from tests.support.torch_jobs import mesh_of, whole

WIDTH, LENGTH, BATCH = 6, 4, 4
Data = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    """A norm, two layers and a head, over (batch, length, width)."""
    torch.manual_seed(5)
    parts = [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)]
    with torch.no_grad():
        parts[0].weight.add_(0.1 * torch.randn(WIDTH))
    return nn.Sequential(*parts)


def batch(seat: int, step: int) -> Data:
    """Inputs and targets of one data-parallel rank."""
    generator = torch.Generator().manual_seed(1000 * seat + step)
    inputs, targets = torch.randn(2, BATCH, LENGTH, WIDTH, generator=generator)
    return inputs, targets


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def theory(s: oracle.Setting, steps: int, seats: int, replicas: int = 2, build: Callable = net) -> list[dict]:
    """replica -> state -> parameter name -> flat tensor; a replica has ``seats`` data-parallel ranks."""
    model = build().double()
    params = dict(model.named_parameters())

    def gradient(replica: int, step: int, vectors: list[Tensor]) -> list[Tensor]:
        torch.nn.utils.vector_to_parameters(vectors[0], params.values())
        model.zero_grad()
        for seat in range(replica * seats, (replica + 1) * seats):
            inputs, targets = batch(seat, step)
            (loss_of(model(inputs.double()), targets.double()) / seats).backward()
        return [torch.cat([param.grad.flatten() for param in params.values()])]

    start = torch.cat([param.detach().flatten() for param in params.values()])
    world = oracle.train([s], [start], replicas, steps, gradient, norm_clip=CLIP)
    sizes = [param.numel() for param in params.values()]
    return [
        {state: dict(zip(params, vector.split(sizes))) for state, vector in oracle.states(s, group).items()}
        for (group,) in world
    ]


def left_out(dims: tuple[str, ...]) -> tuple[nn.Module, dict[str, Any], int]:
    """One layer sharded on ``dims``, all else plain."""
    mesh, model = mesh_of((2, 2), ("replicate", "shard")), net()
    fully_shard(model[1], mesh=mesh[dims])
    return model, {"mesh": mesh}, dist.get_rank()


def tensor_parallel(model: nn.Module, mesh: Any) -> None:
    """The norm on parts of the sequence, two layers cut by columns and rows, the head whole on each rank."""
    plan = {
        "": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),)),
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def replicate_tp() -> tuple[nn.Module, dict[str, Any], int]:
    mesh, model = mesh_of((2, 2), ("replicate", "tp")), net()
    tensor_parallel(model, mesh["tp"])
    return model, {"mesh": mesh}, mesh.get_local_rank("replicate")


BUILDS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any], int]]] = {
    "left out of fsdp": lambda: left_out(("shard",)),
    "left out of hsdp": lambda: left_out(("replicate", "shard")),
    "replicate x tp": replicate_tp,
}


def run(kind: str, blocks: dict, steps: int) -> dict:
    """Trains and returns what this rank's replica holds, the meter and the plan."""
    import deslo_plugin

    model, where, seat = BUILDS[kind]()
    optimizer = deslo_plugin.DesLoc(model.parameters(), blocks)
    attachment = deslo_plugin.attach(model, optimizer, **where)
    for step in range(steps):
        inputs, targets = batch(seat, step)
        for part in (slice(0, 2), slice(2, 4)):  # two micro-batches
            (loss_of(model(inputs[part]), targets[part]) / 2).backward()
        deslo_plugin.clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return answer(model, optimizer, attachment, steps)


def answer(model: nn.Module, optimizer: Any, attachment: Any, steps: int) -> dict:
    states: dict[str, dict[str, Tensor]] = {"params": {}}
    for name, param in model.named_parameters():
        states["params"][name] = whole(param)
        for state in optimizer.param_groups[0]["sync_every"]:
            if state != "params":
                states.setdefault(state, {})[name] = whole(optimizer.state[param][state])
    meter, plan = attachment.stats, attachment.plan
    return {
        "states": states,
        "bytes": dict(meter.bytes),
        "planned": {state: sum(plan.bytes_at(t).get(state, 0) for t in range(steps)) for state in meter.bytes},
    }
