"""Models that a replica's ranks share in other ways than DDP and FSDP2 alone, and what they must come to by the
oracle."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
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
Built = tuple[nn.Module, dict[str, Any], int, Callable[[Tensor, Tensor], None] | None]
"""A model, where it is attached, whose data this rank takes, and its forward and backward if they are its own."""


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


def left_out(dims: tuple[str, ...]) -> Built:
    """One layer sharded on ``dims``, all else plain."""
    mesh, model = mesh_of((2, 2), ("replicate", "shard")), net()
    fully_shard(model[1], mesh=mesh[dims])
    return model, {"mesh": mesh}, dist.get_rank(), None


def tensor_parallel(model: nn.Module, mesh: Any) -> None:
    """The norm on parts of the sequence, two layers cut by columns and rows, the head whole on each rank."""
    plan = {
        "": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),)),
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def replicate_tp() -> Built:
    mesh, model = mesh_of((2, 2), ("replicate", "tp")), net()
    tensor_parallel(model, mesh["tp"])
    return model, {"mesh": mesh}, mesh.get_local_rank("replicate"), None


class Experts(nn.Module):
    """Even positions of a sequence pass through the first half of the experts, odd ones through the second: here those
    of ``own`` alone, to which ``exchange`` brings what all ranks have for them, and brings it back."""

    def __init__(self, own: Sequence[int] = (0, 1), exchange: Callable = lambda tokens: tokens):
        super().__init__()
        torch.manual_seed(6)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.experts = nn.ModuleDict({str(index): layers[index] for index in own})
        self.exchange = exchange

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.exchange(torch.stack([inputs[:, 0::2], inputs[:, 1::2]]))  # by expert
        of_each = [expert(each) for expert, each in zip(self.experts.values(), tokens.chunk(len(self.experts)))]
        outputs = self.exchange(torch.cat(of_each))
        return torch.stack([outputs[0], outputs[1]], 2).flatten(1, 2)


def moe(**options: Any) -> nn.Sequential:
    return nn.Sequential(*net(), Experts(**options))


def expert_parallel() -> Built:
    """An expert on each rank of a replica, under a name of its own; all else sharded over the same ranks."""
    mesh = mesh_of((2, 2), ("replicate", "ep"))
    group = mesh["ep"].get_group()

    def exchange(tokens: Tensor) -> Tensor:
        return all_to_all_single_autograd(tokens.contiguous(), None, None, group)

    model = moe(own=[mesh.get_local_rank("ep")], exchange=exchange)
    for param in model[-1].parameters():
        param.register_hook(lambda gradient: gradient / 2)  # of the mean over ranks, as all other gradients
    fully_shard(model, mesh=mesh["ep"], ignored_params=set(model[-1].parameters()))
    return model, {"mesh": mesh}, dist.get_rank(), None


class Attention(nn.Module):
    """Over the whole sequence, of which ``gather`` brings what other ranks have."""

    def __init__(self, gather: Callable = lambda tensor: tensor):
        super().__init__()
        self.project, self.gather = nn.Linear(WIDTH, 3 * WIDTH), gather

    def forward(self, inputs: Tensor) -> Tensor:
        queries, keys, values = self.project(inputs).chunk(3, -1)
        scores = queries @ self.gather(keys).transpose(1, 2)
        return scores.softmax(-1) @ self.gather(values)


def attention(**options: Any) -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(nn.LayerNorm(WIDTH), Attention(**options), nn.Linear(WIDTH, WIDTH))


def context_parallel() -> Built:
    """Half of each sequence on each rank of a replica; the model plain on both."""
    mesh = mesh_of((2, 2), ("replicate", "cp"))
    group, half = mesh["cp"].get_group(), mesh.get_local_rank("cp")
    model = attention(gather=lambda tensor: all_gather_tensor_autograd(tensor.contiguous(), 1, group))

    def backward(inputs: Tensor, targets: Tensor) -> None:
        inputs, targets = (each.chunk(2, 1)[half] for each in (inputs, targets))
        loss_of(model(inputs), targets).backward()

    return model, {"mesh": mesh}, mesh.get_local_rank("replicate"), backward


def pipeline() -> Built:
    """Two stages that torch.distributed.pipelining trains, named as in the whole model."""
    mesh = mesh_of((2, 2), ("replicate", "pp"))
    index, seat = mesh.get_local_rank("pp"), mesh.get_local_rank("replicate")
    layers = list(net().named_children())
    stage = nn.Sequential(OrderedDict(layers[3:] if index else layers[:3]))
    piped = PipelineStage(stage, index, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(piped, n_microbatches=2, loss_fn=loss_of)

    def backward(inputs: Tensor, targets: Tensor) -> None:
        schedule.step(target=targets) if index else schedule.step(inputs)

    return stage, {"mesh": mesh}, seat, backward


BUILDS: dict[str, Callable[[], Built]] = {
    "left out of fsdp": lambda: left_out(("shard",)),
    "left out of hsdp": lambda: left_out(("replicate", "shard")),
    "replicate x tp": replicate_tp,
    "pipeline": pipeline,
    "expert parallel": expert_parallel,
    "context parallel": context_parallel,
}


def attached(kind: str, blocks: dict) -> tuple[nn.Module, Any, Any, Callable[[range], None]]:
    """Model, optimizer, attachment, and what trains them."""
    import deslo_plugin

    model, where, seat, backward = BUILDS[kind]()
    optimizer = deslo_plugin.DesLoc(model.parameters(), blocks)
    attachment = deslo_plugin.attach(model, optimizer, **where)

    def train(steps: range) -> None:
        for step in steps:
            inputs, targets = batch(seat, step)
            for part in (slice(0, 2), slice(2, 4)) if backward is None else ():  # two micro-batches
                (loss_of(model(inputs[part]), targets[part]) / 2).backward()
            if backward is not None:
                backward(inputs, targets)
            deslo_plugin.clip_grad_norm_(model, CLIP)
            optimizer.step()
            optimizer.zero_grad()

    return model, optimizer, attachment, train


def run(kind: str, blocks: dict, steps: int) -> dict:
    """Trains and returns what this rank's replica holds, the meter and the plan."""
    model, optimizer, attachment, train = attached(kind, blocks)
    train(range(steps))
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
