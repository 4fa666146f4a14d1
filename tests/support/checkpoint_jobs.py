"""Saving, loading and going on, on every rank of a ``Processes`` world."""

import os
import random
import signal
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support import torch_jobs
from tests.support.jobs import engine_for, net, replica_state
from tests.support.jobs import train as train_engine
from tests.support.torch_jobs import attached, states_of


class Job:
    """One job under any framework: ``kind`` is a wrap of torch_jobs ("fsdp 1x4" on a mesh of that shape), or "zero
    <stage>" with a whole DeepSpeed config."""

    def __init__(self, kind: str, config: dict, seed: int = 7, optimizer: Any = None):
        import deslo_plugin  # noqa: F401  (its hooks)

        self.kind = kind
        if kind.startswith("zero"):
            self._manager = engine_for(config, net(seed))
            self.model = self._manager.__enter__()
            self.attachment = self.model.deslo
        else:
            wrap, *shape = kind.split()
            options = {"shape": tuple(map(int, shape[0].split("x")))} if shape else {}
            model = net(seed).bfloat16() if config.get("bf16") else net(seed)
            blocks = {name: block for name, block in config.items() if name != "bf16"}
            self.model, self.optimizer, self.attachment = attached(wrap, blocks, model, optimizer, **options)

    def train(self, steps: range) -> list[float]:
        if self.kind.startswith("zero"):
            return train_engine(self.model, steps)
        return torch_jobs.train(self.model, self.optimizer, steps)

    def states(self) -> dict[str, dict[str, Tensor]]:
        if self.kind.startswith("zero"):
            return replica_state(self.model)
        names = [state for group in self.optimizer.param_groups for state in group["sync_every"] if state != "params"]
        return states_of(self.model, self.optimizer, list(dict.fromkeys(names)))

    def close(self) -> None:
        if self.kind.startswith("zero"):
            self._manager.__exit__(None, None, None)


def resumed(kind: str, config: dict, folder: str, mode: str, before: int, after: int, optimizer: Any = None) -> dict:
    """What comes of a job that goes on after a save, and of a new one that loads what was saved."""
    import deslo_plugin

    job = Job(kind, config, optimizer=optimizer)
    job.train(range(before))
    deslo_plugin.save(folder, job.model, mode=mode, extra={"rank": dist.get_rank(), "batch": before})
    drawn = (torch.rand(1).item(), random.random())
    losses = job.train(range(before, before + after))
    straight = job.states()
    job.close()
    job = Job(kind, config, seed=8 if kind.startswith("zero") else 7, optimizer=optimizer)
    extra = deslo_plugin.load(folder, job.model)
    again = (torch.rand(1).item(), random.random())
    losses_again = job.train(range(before, before + after))
    loaded = job.states()
    job.close()
    return {
        "straight": straight,
        "loaded": loaded,
        "extra": extra,
        "losses": losses == losses_again,
        "random": drawn == again,
    }


def saved(kind: str, config: dict, folder: str, mode: str, steps: int, more: int = 0, optimizer: Any = None) -> dict:
    """This replica's states when it saves, and ``more`` steps later."""
    import deslo_plugin

    job = Job(kind, config, optimizer=optimizer)
    job.train(range(steps))
    before = job.states()
    deslo_plugin.save(folder, job.model, mode=mode, extra={"rank": dist.get_rank()})
    at_save = job.states()
    job.train(range(steps, steps + more))
    later = job.states()
    sent = dict(job.attachment.stats.bytes)
    job.close()
    return {"before": before, "at save": at_save, "later": later, "bytes": sent}


def unsaved(kind: str, config: dict, steps: int) -> dict:
    job = Job(kind, config)
    job.train(range(steps))
    states = job.states()
    job.close()
    return states


def loaded(kind: str, config: dict, folder: str, optimizer: Any = None) -> dict:
    import deslo_plugin

    job = Job(kind, config, seed=7, optimizer=optimizer)
    extra = deslo_plugin.load(folder, job.model)
    states, steps = (
        job.states(),
        job.attachment.averaging.steps if not kind.startswith("zero") else job.model.global_steps,
    )
    job.train(range(steps, steps + 1))  # it trains
    job.close()
    return {"states": states, "steps": steps, "extra": extra}


def refused(kind: str, config: dict, folder: str, change: str = "") -> str:
    """The error of loading ``folder``, or "no error"."""
    import deslo_plugin

    job = Job(kind, config, optimizer={"AdamW": torch_jobs_adamw}.get(change))
    try:
        deslo_plugin.load(folder, job.model)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        job.close()
    return "no error"


def refused_by_torch(kind: str, config: dict) -> dict[str, str]:
    """What plain ways to save a diverged model say, and whether they work when all replicas are equal."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    import deslo_plugin

    job = Job(kind, config)
    inner = getattr(job.model, "module", job.model)
    ways = {
        "state_dict": lambda: inner.state_dict(),
        "optimizer": lambda: job.optimizer.state_dict(),
        "dcp model": lambda: get_model_state_dict(job.model),
        "dcp optimizer": lambda: get_optimizer_state_dict(job.model, job.optimizer),
        "dcp save": lambda: dcp.save({"model": job.model}, checkpoint_id="/nonexistent/never written", no_dist=True),
    }
    before = inner.state_dict()  # replicas are equal at first
    job.train(range(2))
    said = {}
    for way, call in ways.items():
        try:
            call()
            said[way] = "no error"
        except Exception as error:  # torch.distributed.checkpoint wraps what it is told
            said[way] = str(error)
    copy = deepcopy(inner) if kind != "hsdp" else None
    with deslo_plugin.local_state_dict():
        own = inner.state_dict()
    # a copy is no replica
    assert own.keys() == before.keys() and (copy is None or copy.state_dict().keys() == before.keys())
    deslo_plugin.sync_replicas(job.model)
    inner.state_dict(), job.optimizer.state_dict()
    job.close()
    return said


def resumed_with_samples(config: dict, folder: str) -> tuple[dict, dict]:
    """``resumed`` of replicas that count by what they have seen: four steps before, six after."""
    import deslo_plugin

    def train(job: Job, steps: range) -> dict:
        for step in steps:
            job.attachment.record_samples(1 + dist.get_rank() + step % 3)
            job.train(range(step, step + 1))
        return job.states()

    job = Job("plain", config)
    train(job, range(4))
    deslo_plugin.save(folder, job.model, mode="per_replica")
    straight = train(job, range(4, 10))
    job = Job("plain", config)
    deslo_plugin.load(folder, job.model)
    return straight, train(job, range(4, 10))


def two_optimizers(folder: str) -> dict:
    """Muon and AdamW step one model: what comes of going on after a save, and of loading it into new ones."""
    import deslo_plugin

    def made(seed: int) -> tuple:
        model = net(seed)
        muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-2)
        deslo_plugin.attach(model, muon, {"deslo": {"sync_every": {"params": 2, "momentum_buffer": 3}}})
        deslo_plugin.attach(model, adamw, {"deslo": {"sync_every": {"params": 2, "exp_avg": 4, "exp_avg_sq": 6}}})
        return model, (muon, adamw)

    def train(model: Any, optimizers: tuple, steps: range) -> list[Tensor]:
        for step in steps:
            torch_jobs.loss_of(model, torch_jobs.batch(dist.get_rank(), step, 0)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [param.detach().clone() for param in model.parameters()]

    model, optimizers = made(7)
    train(model, optimizers, range(3))
    deslo_plugin.save(folder, model, mode="per_replica")
    straight = train(model, optimizers, range(3, 9))
    model, optimizers = made(7)
    deslo_plugin.load(folder, model)
    return {"straight": straight, "loaded": train(model, optimizers, range(3, 9))}


def killed_in_a_save(config: dict, folder: str) -> str:
    """Saves; rank 2 dies inside a second save, as it writes its tensors. What the others say."""
    import deslo_plugin

    job = Job("plain", config)
    job.train(range(2))
    deslo_plugin.save(folder, job.model)
    job.train(range(2, 3))
    if dist.get_rank() == 2:
        torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        deslo_plugin.save(folder, job.model, mode="per_replica")
    except Exception as error:
        return str(error)
    return "no error"


def loaded_by_three(config: dict, folder: str) -> dict | None:
    """The states that ranks 0 to 2, three replicas of one rank, have loaded; and how far apart they are three steps
    later."""
    import deslo_plugin

    three = dist.new_group([0, 1, 2])
    if dist.get_rank() == 3:
        return None
    model = net(9)
    optimizer = deslo_plugin.DesLoc(torch_jobs.two_groups(model), config)
    attachment = deslo_plugin.attach(model, optimizer, process_group=three)
    deslo_plugin.load(folder, model)
    states = states_of(model, optimizer, ["exp_avg", "exp_avg_2", "exp_avg_sq"])
    torch_jobs.train(model, optimizer, range(attachment.averaging.steps, 9))
    deslo_plugin.sync_replicas(model)
    return {"states": states, "together": states_of(model, optimizer, [])}


def alone() -> tuple:
    """A model and its optimizer in a process that was started alone."""
    import deslo_plugin

    model = net(seed=9)
    optimizer = deslo_plugin.DesLoc(model.parameters())
    deslo_plugin.attach(model, optimizer)
    return model, optimizer


def save_on_and_on(path: Any, first: int, tell: Any, wait: bool = True) -> None:
    """Saves, again and again, a state of one number that grows by one each time, and tells once one is there."""
    import deslo_plugin

    torch.set_num_threads(1)
    model, optimizer = alone()
    for number in range(first, first + 900):
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(number)
                optimizer.state[param]["exp_avg"].fill_(number)
        pending = deslo_plugin.save(path, model, wait=wait)
        if pending is not None and number == first:
            pending.wait()
        tell.send(number)


def torch_jobs_adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(torch_jobs.stock_groups(model), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
