"""DeepSpeed: an ordinary training loop; its JSON says all there is to say about replicas."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import param_groups
from .job import Batch, Job, own_device

if own_device().type == "cpu":  # DeepSpeed reads the variable as it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger

from deslo_plugin import averaged_state_dict


def start(model: nn.Module, config: Mapping[str, Any], replica_size: int) -> Job:
    """A DeepSpeed engine, which reads the size of a replica from the config."""
    quieten()
    # Else DeepSpeed compiles an all-reduce for inference on CPUs: half a minute, a compiler, and, where a process is
    # killed meanwhile, a stale lock for which every later process waits in silence.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=param_groups(model, config), config=dict(config))

    def step(batches: Sequence[Batch]) -> Tensor:
        for tokens, targets in batches:
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
        return loss.detach()

    deslo = getattr(engine, "deslo", None)
    return Job(engine.device, step, lambda: averaged_state_dict(engine), deslo, engine.communication_data_type)


def quieten() -> None:
    """Leave the screen to the run: DeepSpeed's errors and rank 0's warnings stay, its greetings go."""
    logger.setLevel("WARNING" if os.environ["RANK"] == "0" else "ERROR")
    # Every scheduler warns of this while it is being built.
    logger.addFilter(lambda record: "learning rate from scheduler before it has started" not in record.getMessage())
    # About torch's own functions, which DeepSpeed calls: pinned memory without a GPU, names that will go.
    warnings.filterwarnings("ignore", module=r"torch\.")
