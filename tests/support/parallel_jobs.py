"""What models of ``parallel_builds`` do on every rank of a ``Processes`` world."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.attaching import adamw, config, heard
from tests.support.parallel_builds import BUILDS
from tests.support.parallel_models import batch, loss_of
from tests.support.theory import CLIP
from tests.support.torch_jobs import mesh_of, whole


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
