"""Saving, loading and going on, on every rank of a ``Processes`` world."""

import random
from typing import Any

import torch
import torch.distributed as dist
import torch_jobs
from jobs import engine_for, net, replica_state
from jobs import train as train_engine
from torch import Tensor
from torch_jobs import attached, states_of


class Job:
    """One job under any framework: ``kind`` is a wrap of torch_jobs, or "zero <stage>" with a whole DeepSpeed config."""

    def __init__(self, kind: str, config: dict, seed: int = 7, optimizer: Any = None):
        import deslo_plugin  # noqa: F401

        self.kind = kind
        if kind.startswith("zero"):
            self._manager = engine_for(config, net(seed))
            self.model = self._manager.__enter__()
            self.attachment = self.model.deslo
        else:
            self.model, self.optimizer, self.attachment = attached(kind, config, net(seed), optimizer)

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
    return {"straight": straight, "loaded": loaded, "extra": extra, "losses": losses == losses_again, "random": drawn == again}


def saved(kind: str, config: dict, folder: str, mode: str, steps: int, more: int = 0, optimizer: Any = None) -> dict:
    """This replica's states when it saves, and ``more`` steps later."""
    import deslo_plugin

    job = Job(kind, config, optimizer=optimizer)
    job.train(range(steps))
    before = job.states()
    deslo_plugin.save(folder, job.model, mode=mode)
    at_save = job.states()
    job.train(range(steps, steps + more))
    later = job.states()
    sent = dict(job.attachment.meter.bytes)
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
    deslo_plugin.load(folder, job.model)
    states, steps = job.states(), job.attachment.averaging.steps if not kind.startswith("zero") else job.model.global_steps
    job.train(range(steps, steps + 1))  # it trains
    job.close()
    return {"states": states, "steps": steps}


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


def torch_jobs_adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(torch_jobs.stock_groups(model), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
