"""Jobs that write telemetry, run on every rank of a ``Processes`` world."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.support.jobs import engine_for
from tests.support.jobs import train as train_engine
from tests.support.torch_jobs import attached, train


def sums(attachment: Any, steps: int) -> dict:
    """What the meter and the plan say of a run of ``steps``."""
    meter, plan = attachment.stats, attachment.plan
    return {
        "bytes": dict(meter.bytes),
        "events": dict(meter.events),
        "exposed": meter.seconds_exposed,
        "taken": meter.steps,
        "planned": {state: sum(plan.bytes_at(t).get(state, 0) for t in range(steps)) for state in meter.bytes},
        "drift": {state: (drift.distance, drift.cosine) for state, drift in meter.drift.items()},
    }


def recorded(wrap: str, blocks: dict, steps: int) -> dict:
    """Trains with a log at each step, and ends the recording."""
    model, optimizer, attachment = attached(wrap, blocks)
    for step in range(steps):
        losses = train(model, optimizer, range(step, step + 1))
        attachment.log(loss=losses[-1], tokens=7)
    attachment.close()
    return sums(attachment, steps) | {"summary": attachment.summary()}


def resumed(blocks: dict, before: int, after: int) -> None:
    """A run that ends, and one that goes on in the same folder from the same steps."""
    for first, last in ((0, before), (before - 1, after)):
        model, optimizer, attachment = attached("plain", blocks)
        for param in model.parameters():
            optimizer.state[param]["step"].fill_(first)
        train(model, optimizer, range(first, last))
        attachment.close()


def killed(blocks: dict, folder: str, rank: int) -> None:
    """Trains until this rank's file has lines, and is killed."""
    model, optimizer, attachment = attached("plain", blocks)
    for step in range(10**6):
        train(model, optimizer, range(step, step + 1))
        attachment.log(loss=float(step))
        if dist.get_rank() == rank and step % 50 == 0:
            path = Path(folder) / f"replica-{rank}.jsonl"
            if path.read_text().count("\n") > 20:
                os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == rank:
            time.sleep(1e-3)


def engine_recorded(ds: dict, steps: int) -> dict:
    with engine_for(ds) as engine:
        train_engine(engine, range(steps))
        engine.deslo.close()
        return sums(engine.deslo, steps) | {"samples": engine.train_batch_size()}


def tracked(blocks: dict, steps: int) -> list[tuple[dict, int]]:
    """Accelerate with a tracker of our own: what it was told."""
    from accelerate.tracking import GeneralTracker

    from tests.support import accelerate_jobs

    told: list[tuple[dict, int]] = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "ours", False, None

        def __init__(self) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict) -> None:
            pass

        def log(self, values: dict, step: int | None, **_: Any) -> None:
            told.append((values, step))

    accelerator, model, optimizer = accelerate_jobs.prepared("ddp", "before", "DesLoc", blocks, log_with=Tracker())
    accelerator.init_trackers("run")
    accelerate_jobs.steps(accelerator, model, optimizer, range(steps))
    accelerator.deslo.close()
    return told


def refusal(blocks: dict, folder: str, broken: int) -> str:
    """Of attaching in ``folder``, ``broken`` being a rank that starts where nothing can be written."""
    import deslo_plugin

    before = os.getcwd()
    os.chdir("/proc" if dist.get_rank() == broken else folder)
    try:
        attached("plain", blocks)
    except deslo_plugin.ConfigError as error:
        return str(error)
    finally:
        os.chdir(before)
    return "no error"
