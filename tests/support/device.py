"""Where tests put tensors and models: ``DESLO_TEST_DEVICE``, by default the CPU. ``DESLO_TEST_DEVICE=cuda`` runs the
suite on a GPU as it is.

With another device than the CPU, ``install`` makes what a file of tests/ creates without ``device=`` lie there:
tensors of torch's factories and modules of torch.nn, with the numbers that they have on the CPU. What the package,
torch or a framework creates stays where it puts it, so that a tensor on the wrong device is found. Oracles compute on
the CPU, and what comes from another device is compared there.

All ranks of a world share ``cuda:0`` and travel over gloo, since NCCL refuses two ranks on one device. For the same
reason scripts of several ranks see no GPU, and run on the CPU as ever.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

DEVICE = torch.device(os.environ.get("DESLO_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"
ACCELERATOR = DEVICE.type  # DeepSpeed's name for it
HERE = f"{Path(__file__).resolve().parents[1]}{os.sep}"
TORCH = f"{Path(torch.__file__).resolve().parent}{os.sep}"
ORACLES = {f"{HERE}support{os.sep}{name}.py" for name in ("device", "oracle", "sequence_oracle", "theory")}
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
RANDOM = ("rand", "randint", "randn", "randperm")
VISIBLE = "DESLO_TEST_VISIBLE"  # what CUDA_VISIBLE_DEVICES is in ranks of a world
if VISIBLE in os.environ:  # before CUDA looks
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.pop(VISIBLE)


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """Skips a test on a GPU, because of what it is about."""
    return pytest.mark.skipif(not ON_CPU, reason=f"{reason}: a question for the CPU alone")


def on_cpu(value: Any) -> Any:
    """``value`` with all tensors in it on the CPU."""
    return tree_map(lambda each: each.cpu() if isinstance(each, torch.Tensor) else each, value)


def install() -> None:
    """Makes this process create on ``DEVICE`` what tests create; nothing on the CPU."""
    if ON_CPU:
        return
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE.index or 0)
    for name in FACTORIES:
        setattr(torch, name, _created_there(getattr(torch, name)))
    for name in RANDOM:
        setattr(torch, name, _moved_there(getattr(torch, name)))
    for module in vars(nn).values():
        if isinstance(module, type) and hasattr(module, "reset_parameters"):
            module.__init__ = _built_there(module.__init__)
    for owner, name in ((torch, "equal"), (torch, "allclose"), (torch.testing, "assert_close")):
        setattr(owner, name, _compared_on_cpu(getattr(owner, name)))


def hide_gpus() -> None:
    """Scripts that this process starts see no GPU; ranks of a ``Processes`` world do."""
    if DEVICE.type == "cuda":
        torch.cuda.init()
        os.environ[VISIBLE] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _of_a_test(frame: Any) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(HERE) and name not in ORACLES


def _created_there(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        if "device" not in options and "out" not in options and _of_a_test(sys._getframe(1)):
            options["device"] = DEVICE
        return make(*args, **options)

    return made


def _moved_there(make: Callable[..., Any]) -> Callable[..., Any]:
    """Of random numbers, which are those of the CPU everywhere."""

    @wraps(make)
    def made(*args: Any, requires_grad: bool = False, **options: Any) -> Any:
        tensor = make(*args, **options)
        if "device" not in options and "out" not in options and _of_a_test(sys._getframe(1)):
            tensor = tensor.to(DEVICE)
        return tensor.requires_grad_() if requires_grad else tensor

    return made


def _built_there(build: Callable[..., None]) -> Callable[..., None]:
    @wraps(build)
    def built(self: nn.Module, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        if options.get("device") is None and _of_a_test(frame):
            if not any(tensor.is_meta for tensor in self.parameters()):
                self.to(DEVICE)

    return built


def _compared_on_cpu(compare: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compare)
    def compared(ours: Any, theirs: Any, *args: Any, **options: Any) -> Any:
        if _of_a_test(sys._getframe(1)):
            ours, theirs = on_cpu(ours), on_cpu(theirs)
        return compare(ours, theirs, *args, **options)

    return compared
