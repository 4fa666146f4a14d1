"""Training in fragments, on every rank of a ``Processes`` world."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.support.checkpoint_jobs import Job


def run(kind: str, config: dict, steps: int) -> dict:
    """Trains; where the fragments lie, and what the rank has sent, planned and come to."""
    job = Job(kind, config)
    events = []
    job.attachment.averaging.listeners.append(events.append)
    job.train(range(steps))
    plan, meter = job.attachment.plan, job.attachment.stats
    last = steps + (job.attachment.config.deslo.average_at == "after_step")  # what is due at the end has not landed yet
    sent: dict[int, int] = {}
    for event in events:
        sent[event.steps] = sent.get(event.steps, 0) + sum(event.bytes.values())
    result = {
        "states": job.states(),
        "places": _places(job),  # after the states, which it overwrites
        "bytes": dict(meter.bytes),
        "planned": {state: sum(plan.bytes_at(t).get(state, 0) for t in range(1, last)) for state in meter.bytes},
        "at each step": sent,
        "peak": plan.peak_bytes,
    }
    job.close()
    return result


def _places(job: Job) -> dict[str, Tensor]:
    """Of each parameter of the model, the fragment of each element: written into a momentum, and read from the
    whole."""
    averaging = job.attachment.averaging

    with torch.no_grad():
        for _ in _shown(job):
            for group in averaging.groups:
                for cohort in averaging.clock.cohorts(group, group["params"]):
                    for index in range(averaging.fragments.count):
                        for part in averaging.part(averaging.fragments.of(cohort, index), "exp_avg"):
                            part.fill_(index)
    return {name: tensor.long().flatten() for name, tensor in job.states()["exp_avg"].items()}


def _shown(job: Job) -> Iterator[None]:
    if job.kind.startswith("zero"):
        from deslo_plugin.frameworks.deepspeed.zero import each_sub_group

        yield from each_sub_group(job.model)
    else:
        yield
