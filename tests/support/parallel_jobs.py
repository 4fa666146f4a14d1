"""Models that a replica's ranks share in other ways than DDP and FSDP2 alone, run on every rank of a ``Processes``
world."""

import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
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

from tests.support.attaching import adamw, config, heard
from tests.support.parallel_models import attention, batch, loss_of, moe, net, stacked_moe
from tests.support.theory import CLIP
from tests.support.torch_jobs import mesh_of, whole

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
    "expert parallel": expert_parallel,
    "experts in a tensor": partial(expert_parallel, "tensor"),
    "experts beside one layer": partial(expert_parallel, "one layer"),
    "context parallel": context_parallel,
    "five dimensions": five_dimensions,
    **{kind: partial(three_dimensions, kind) for kind in ("fsdp x tp", "hsdp x tp", "fsdp x pp", "hsdp x pp")},
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
    assert attachment.check() == []
    return answer(model, optimizer, attachment, steps)


def one_replica_ahead(kind: str, blocks: dict, free: int, folder: str) -> int:
    """Replica 0 takes ``free`` steps while the other waits for a file that it writes then; then both go on. If anything
    crossed replicas in those steps, replica 0 would wait for ever."""
    *_, attachment, train = attached(kind, blocks)
    done = Path(folder)
    if attachment.topology.replica == 0:
        train(range(free))
        (done / str(dist.get_rank())).touch()
    else:
        deadline = time.monotonic() + 60
        while len(list(done.iterdir())) < attachment.topology.replica_size:
            assert time.monotonic() < deadline, "replica 0 waited for something from another replica"
            time.sleep(0.01)
        train(range(free))
    train(range(free, free + 2))
    return attachment.steps


def norms(kind: str, blocks: dict) -> list[float]:
    """Of the first gradient of this rank's replica, by three orders."""
    import deslo_plugin

    model, where, seat, backward = BUILDS[kind]()
    deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), blocks), **where)
    inputs, targets = batch(seat, 0)
    backward(inputs, targets) if backward else loss_of(model(inputs), targets).backward()
    found = [float(deslo_plugin.clip_grad_norm_(model, 1e9, order)) for order in (1.0, 2.0, torch.inf)]
    clipped = [deslo_plugin.clip_grad_norm_(model, 0.1), deslo_plugin.clip_grad_norm_(model, 1.0)]
    return [*found, *map(float, clipped)]


def idle_expert(steps: int) -> tuple[list[str], dict[str, Tensor]]:
    """A stock optimizer that has no state of rank 1's expert, which no token reaches at first: problems, and the states
    of this rank's expert."""
    import deslo_plugin

    model, where, seat, _ = BUILDS["expert parallel"]()
    optimizer = adamw(model)
    attachment = deslo_plugin.attach(model, optimizer, config(), **where)
    for step in range(steps):
        inputs, targets = batch(seat, step)
        loss_of(model(inputs), targets).backward()
        if step < 4 and dist.get_rank() == 1:
            model[-1].zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    bias = list(model[-1].parameters())[-1]
    return attachment.check(), {name: value.clone() for name, value in optimizer.state[bias].items()}


def tied(reduces: bool) -> tuple[list[str], list[str]]:
    """Two stages that share a table, whose gradients the script adds or leaves: what was said, and problems."""
    import deslo_plugin

    mesh = mesh_of((2, 2), ("replicate", "pp"))
    torch.manual_seed(3)
    stage = nn.ParameterDict({"table": torch.randn(4, 3), f"own{mesh.get_local_rank('pp')}": torch.randn(3)})
    optimizer = adamw(stage)
    with heard() as lines:
        attachment = deslo_plugin.attach(stage, optimizer, config(), mesh=mesh)
        for _ in range(4):  # an average after the third
            sum((param - dist.get_rank()).square().sum() for param in stage.values()).backward()
            if reduces:
                dist.all_reduce(stage["table"].grad, group=mesh["pp"].get_group())
            optimizer.step()
            optimizer.zero_grad()
        return lines, attachment.check()


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


def saved(kind: str, blocks: dict, folder: str, mode: str) -> dict:
    """Whether what is loaded, at once and by another model, is what was saved; and the exports."""
    import deslo_plugin

    model, optimizer, attachment, train = attached(kind, blocks)
    train(range(5))
    whole_model = deslo_plugin.averaged_state_dict(model)
    with deslo_plugin.averaged_weights(model):
        here = {name: whole(param) for name, param in model.named_parameters()}
    deslo_plugin.save(folder, model, mode=mode, extra={"step": 5})
    train(range(5, 9))
    straight = answer(model, optimizer, attachment, 9)["states"]
    assert deslo_plugin.load(folder, model) == {"step": 5}
    train(range(5, 9))
    again = answer(model, optimizer, attachment, 9)["states"]
    same = all(torch.equal(own, again[state][name]) for state in straight for name, own in straight[state].items())
    return {"whole": whole_model, "here": here, "same": same, "steps": attachment.steps}


def loaded_plain(build: Callable, blocks: dict, folder: str) -> tuple[int, dict[str, Tensor]]:
    """Step and parameters of four replicas of one rank that load a checkpoint."""
    import deslo_plugin

    model = build()
    optimizer = deslo_plugin.DesLoc(model.parameters(), blocks)
    attachment = deslo_plugin.attach(model, optimizer)
    deslo_plugin.load(folder, model)
    return attachment.steps, {name: param.detach().clone() for name, param in model.named_parameters()}
