"""Where tests put tensors and models: ``DESLO_TEST_DEVICE``, by default the CPU.

On a GPU all ranks of a world share ``cuda:0`` and travel over gloo, since NCCL refuses two ranks on one device.
"""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("DESLO_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"
ACCELERATOR = DEVICE.type  # DeepSpeed's name for it


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """Skips a test on a GPU, because of what it is about."""
    return pytest.mark.skipif(not ON_CPU, reason=f"{reason}: a question for the CPU alone")


def use_device() -> None:
    """Makes the device the current one of this process."""
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE.index or 0)
