"""Ways in which the ranks of a replica share a model, beside DDP and FSDP2 alone."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.support.parallel_models import attention, loss_of, moe, net, stacked_moe
from tests.support.torch_jobs import mesh_of

Built = tuple[nn.Module, dict[str, Any], int, Callable[[Tensor, Tensor], None] | None]
"""A model, where it is attached, whose data this rank takes, and its forward and backward if they are its own."""


def left_out(*dims: str, shape: tuple = (2, 2), names: tuple = ("replicate", "shard")) -> Built:
    """One layer sharded on ``dims``, all else plain."""
    mesh, model = mesh_of(shape, names), net()
    fully_shard(model[1], mesh=mesh[dims])
    return model, {"mesh": mesh, "replicate": names[0]}, dist.get_rank(), None


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


def expert_parallel(kind: str = "by name") -> Built:
    """An expert on each rank of a replica, under a name of its own or as part of a DTensor; all else sharded over the
    same ranks, or "one layer" alone."""
    mesh = mesh_of((2, 2), ("replicate", "ep"))
    group = mesh["ep"].get_group()

    def exchange(tokens: Tensor) -> Tensor:
        return all_to_all_single_autograd(tokens.contiguous(), None, None, group)

    if kind == "tensor":
        model = stacked_moe(exchange=exchange, mesh=mesh["ep"])
    else:
        model = moe(own=[mesh.get_local_rank("ep")], exchange=exchange)
    for param in model[-1].parameters():
        param.register_hook(lambda gradient: gradient / 2)  # of the mean over ranks, as all other gradients
    if kind == "one layer":
        fully_shard(model[1], mesh=mesh["ep"])
    else:
        fully_shard(model, mesh=mesh["ep"], ignored_params=set(model[-1].parameters()))
    return model, {"mesh": mesh}, dist.get_rank(), None


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
    stage, backward = piped(mesh)
    return stage, {"mesh": mesh}, mesh.get_local_rank("replicate"), backward


def piped(mesh: DeviceMesh) -> tuple[nn.Sequential, Callable[[Tensor, Tensor], None]]:
    """This rank's stage, and what trains it."""
    index = mesh.get_local_rank("pp")
    layers = list(net().named_children())
    stage = nn.Sequential(OrderedDict(layers[3:] if index else layers[:3]))
    place = PipelineStage(stage, index, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(place, n_microbatches=2, loss_fn=loss_of)

    def backward(inputs: Tensor, targets: Tensor) -> None:
        schedule.step(target=targets) if index else schedule.step(inputs)

    return stage, backward


def interleaved() -> Built:
    """Two stages on each rank, every second one; what is attached holds the layers of both."""
    mesh = mesh_of((2, 2), ("replicate", "pp"))
    index, group = mesh.get_local_rank("pp"), mesh["pp"].get_group()
    layers = list(net().named_children())
    cuts = layers[:1], layers[1:3], layers[3:4], layers[4:]
    stages = {number: nn.Sequential(OrderedDict(cuts[number])) for number in (index, index + 2)}
    places = [PipelineStage(stage, number, 4, torch.device("cpu"), group=group) for number, stage in stages.items()]
    schedule = ScheduleInterleaved1F1B(places, n_microbatches=2, loss_fn=loss_of)

    def backward(inputs: Tensor, targets: Tensor) -> None:
        schedule.step(target=targets) if index else schedule.step(inputs)

    both = nn.Sequential(OrderedDict(cuts[index] + cuts[index + 2]))
    return both, {"mesh": mesh}, mesh.get_local_rank("replicate"), backward


def three_dimensions(kind: str) -> Built:
    """8 ranks: 2 replicas of 2 x 2 in which ``fully_shard`` meets tensor parallelism or stages."""
    inner = "pp" if kind.endswith("pp") else "tp"
    mesh = mesh_of((2, 2, 2), ("replicate", "shard", inner))
    seat = 2 * mesh.get_local_rank("replicate") + mesh.get_local_rank("shard")
    dims = ("replicate", "shard") if kind.startswith("hsdp") else ("shard",)
    if inner == "pp":
        stage, backward = piped(mesh)
        for layer in stage:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh[dims])
        return stage, {"mesh": mesh}, seat, backward
    model = net()
    tensor_parallel(model, mesh["tp"])
    fully_shard(model, mesh=mesh[dims])
    return model, {"mesh": mesh}, seat, None


def five_dimensions() -> Built:
    """8 ranks: HSDP of stages that tensor parallelism cuts, over a mesh that could hold context parallelism too."""
    mesh = mesh_of((2, 1, 2, 1, 2), ("replicate", "shard", "pp", "cp", "tp"))
    stage, backward = piped(mesh)
    cut = {"1": ColwiseParallel(output_layouts=Replicate())}, {"3": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(stage, mesh["tp"], cut[mesh.get_local_rank("pp")])
    fully_shard(stage, mesh=mesh["replicate", "shard"])
    return stage, {"mesh": mesh}, mesh.get_local_rank("replicate"), backward


BUILDS: dict[str, Callable[[], Built]] = {
    "left out of fsdp": partial(left_out, "shard"),
    "left out of hsdp": partial(left_out, "replicate", "shard"),
    "left out of hsdp inside": partial(left_out, "node", "shard", shape=(2, 2, 1), names=("site", "node", "shard")),
    "replicate x tp": replicate_tp,
    "pipeline": pipeline,
    "interleaved pipeline": interleaved,
    "expert parallel": expert_parallel,
    "experts in a tensor": partial(expert_parallel, "tensor"),
    "experts beside one layer": partial(expert_parallel, "one layer"),
    "context parallel": context_parallel,
    "five dimensions": five_dimensions,
    **{kind: partial(three_dimensions, kind) for kind in ("fsdp x tp", "hsdp x tp", "fsdp x pp", "hsdp x pp")},
}
