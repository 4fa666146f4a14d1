"""Training with adaptive periods, on every rank of a ``Processes`` world."""

import torch.distributed as dist

from deslo_plugin.averaging.metrics import SyncEvent
from tests.support.checkpoint_jobs import Job


def run(kind: str, config: dict, steps: int, folder: str = "") -> dict:
    """Trains, saves an average in ``folder``, and returns what the rank has sent when, by which periods, and its
    states."""
    import deslo_plugin

    job = Job(kind, config)
    events: list[SyncEvent] = []
    job.attachment.averaging.listeners.append(events.append)
    periods = [job.attachment.periods]
    for step in range(steps):
        job.train(range(step, step + 1))
        periods.append(job.attachment.periods)
    plan, meter = job.attachment.plan, job.attachment.stats
    result = {
        "states": job.states(),
        "periods": periods,
        "schedule": [(event.steps, state) for event in events for state in event.bytes],
        "bytes": dict(meter.bytes),
        "events": dict(meter.events),
        "each": [dict(group.bytes_per_event) for group in plan.groups],
        "planned": {state: sum(plan.bytes_at(t).get(state, 0) for t in range(1, steps)) for state in meter.bytes},
    }
    job.attachment.close()
    if folder:
        deslo_plugin.save(folder, job.model, mode="averaged")
    job.close()
    return result


def periods_after_load(kind: str, config: dict, folder: str, steps: int) -> list[dict]:
    """The periods in force ``steps`` steps after an average was loaded."""
    import deslo_plugin

    job = Job(kind, config)
    deslo_plugin.load(folder, job.model)
    done = job.attachment.averaging.steps if not kind.startswith("zero") else job.model.global_steps
    job.train(range(done, done + steps))
    periods = job.attachment.periods
    job.close()
    return periods


def refused_on_other_kernels(config: dict) -> str:
    """What is said where rank 3 measures with other kernels than the rest."""
    from deslo_plugin.checks import replica_checks as equality

    own = equality.kernels_on
    if dist.get_rank() == 3:
        equality.kernels_on = lambda tensors: "another on cpu"
    try:
        Job("plain", config)
    except ValueError as error:
        return str(error)
    finally:
        equality.kernels_on = own
    return "no error"
