"""One rank of ``clock.py``: one replica of every contestant, on the data that the study's simulated replica of that
number sees."""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from benchmarks.quality.methods import Preset, Run
from benchmarks.quality.trial import SCHEDULES
from benchmarks.simulation.small_gpt import drawn, initial, kept
from benchmarks.slow_link.contestants import NEVER, Running, Setting, accelerate_local_sgd, ddp, post_local_sgd, wrapped
from benchmarks.slow_link.rank import serve
from deslo_plugin import DesLoc, attach
from deslo_plugin.comm.transport import SingleReplica

PEERS = {"ddp": ddp, "accelerate": accelerate_local_sgd, "post-local-sgd": post_local_sgd}


def build(how: str, run: Run, preset: Preset) -> Running:
    """A peer, or with ``how`` "ours" the run's own method; all from the run's start, with its update."""

    def local(model: nn.Module) -> DesLoc:
        params = run.blocks["optimizer"]["params"] | {"sync_every": {"params": NEVER}}
        return DesLoc(model.parameters(), {"optimizer": {"params": params}}, transport=SingleReplica())

    setting = Setting(preset.shape, preset.sequences, preset.period, preset.warm_up, local)
    torch.manual_seed(run.seed)
    if how != "ours":
        return PEERS[how](setting)
    model = wrapped(setting)
    optimizer = DesLoc(
        model.parameters(), {"optimizer": run.blocks["optimizer"], "deslo": {**run.blocks["deslo"], "replica_size": 1}}
    )
    attachment = attach(model, optimizer)
    meter = attachment.stats
    return Running(
        model,
        optimizer,
        lambda steps: sum(attachment.plan.bytes_at(steps).values()),
        waited=lambda: meter.seconds_exposed,
    )


class Rank:
    """What ``World.ask`` can ask for, by method name."""

    def start(self, preset: Preset, entrants: dict[str, tuple[str, Run]]) -> None:
        """Builds every contestant anew; ``entrants`` says how and for which run."""
        self.runs = {name: run for name, (_, run) in entrants.items()}
        self.running = {name: build(how, run, preset) for name, (how, run) in entrants.items()}
        self.done = dict.fromkeys(entrants, 0)
        run = next(iter(self.runs.values()))
        self.batches = drawn(preset.shape, sequences=preset.sequences, replicas=dist.get_world_size(), seed=run.seed)
        self.rate = SCHEDULES[preset.schedule](preset.steps)
        self.held_out = kept(preset.shape, preset.held_out)
        self.judge = initial(preset.shape, run.seed)

    def advance(self, name: str, steps: int) -> tuple[float, float]:
        """Seconds that ``steps`` more steps took, and of those that its meter counted as waiting."""
        running, run, rank = self.running[name], self.runs[name], dist.get_rank()
        base, waited = run.blocks["optimizer"]["params"]["lr"], running.waited()
        dist.barrier()
        start = time.perf_counter()
        for step in range(self.done[name], self.done[name] + steps):
            (tokens,), (targets,) = self.batches([rank], step)
            for group in running.optimizer.param_groups:
                group["lr"] = base * self.rate(step)
            running.model(tokens, targets).backward()
            clip_grad_norm_(running.model.parameters(), run.norm_clip)
            running.optimizer.step()
            running.optimizer.zero_grad()
            running.after()
        self.done[name] += steps
        return time.perf_counter() - start, running.waited() - waited

    @torch.no_grad()
    def loss(self, name: str) -> float | None:
        """Validation loss of the replicas' mean, nats per byte; told by rank 0."""
        mean = parameters_to_vector(self.running[name].model.parameters()).clone()
        dist.all_reduce(mean)
        if dist.get_rank():
            return None
        vector_to_parameters(mean / dist.get_world_size(), self.judge.parameters())
        return float(torch.stack([self.judge(*batch) for batch in self.held_out]).mean())

    def leave(self) -> None:
        dist.barrier()


if __name__ == "__main__":
    serve(Rank)
