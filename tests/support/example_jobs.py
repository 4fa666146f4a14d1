"""The main job of examples/ in a world that stands already, on every rank of a ``Processes`` world."""

import contextlib
import io
import logging
import os


def trained(framework: str, options: list[str]) -> tuple[float, dict[str, int], int]:
    """(validation loss, bytes by state, replicas) of one run of examples/train.py."""
    from accelerate.state import AcceleratorState, GradientState

    from examples.harness.command import arguments
    from examples.harness.worker import train

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the world that stands is gloo's
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    logging.getLogger("deslo_plugin").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(arguments(["--framework", framework, *options]))
    return result.loss, result.bytes, result.replicas


def learning_rates(steps: int, params: dict) -> tuple[list[float], list[float]]:
    """(ours, DeepSpeed's) lr of the first ``steps`` steps."""
    import torch
    from deepspeed.runtime.lr_schedules import WarmupCosineLR

    from examples.harness.frameworks.blocks import schedule_for

    seen = []
    for make in (
        lambda optimizer: schedule_for(optimizer, {"scheduler": {"type": "WarmupCosineLR", "params": params}}),
        lambda optimizer: WarmupCosineLR(optimizer, **params),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.003)
        schedule, rates = make(optimizer), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        seen.append(rates)
    return tuple(seen)
