"""Which kernels run where: the native ones, or torch's operators, and then why and what to do.

The native module adds implementations to the operators of this folder when it is imported. Those for CUDA may still
not run: the driver may be older than the module's runtime, or the module may hold no code for the GPU. ``settle``
finds that out before the first kernel of a device starts, says it once, and gives the operators to torch.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from deslo_plugin.errors import require
from deslo_plugin.log import log_rank0

TORCHS = "torch's operators"
BUILD = "DESLO_NATIVE={} pip install -v --no-build-isolation"
NO_CODE = ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction", "cudaErrorUnsupportedPtxVersion")
OLD_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorCompatNotSupportedOnDevice", "cudaErrorSystemDriverMismatch")


class Complaint(NamedTuple):
    """Why native kernels do not run on a device, and what to do."""

    why: str
    do: str


class _Operator(NamedTuple):
    library: torch.library.Library
    name: str
    reference: Callable[..., object]


_operators: list[_Operator] = []
_module: ModuleType | None = None
_misfit = ""  # why the native module that is there was not loaded


def define(library: torch.library.Library, schema: str, reference: Callable[..., object]) -> None:
    """Defines an operator that runs ``reference`` where no native kernel does."""
    name = schema.split("(")[0]
    library.define(schema)
    library.impl(name, reference, "CompositeExplicitAutograd")
    _operators.append(_Operator(library, name, reference))


def load() -> None:
    """Imports the native module, if it was built and fits torch. What it is missing for is said by ``settle``, when
    rank 0 is known."""
    global _module, _misfit
    if importlib.util.find_spec("deslo_plugin._C") is None:
        return
    try:
        _module = importlib.import_module("deslo_plugin._C")
    except ImportError as error:
        _misfit = str(error)


def native() -> str:
    """The kernels that were built: ``"cpu+cuda"``, ``"cpu"`` or ``"python"`` (none)."""
    return _module.backends if _module else "python"


def kernels_on(tensors: Iterable[Tensor]) -> str:
    """What runs on the devices of ``tensors``, as "native on NVIDIA H100": replicas that are compared have it alike."""
    found = set()
    for device in {tensor.device for tensor in tensors}:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found.add(f"{TORCHS if complaint(device) else 'native'} on {name}")
    return ", ".join(sorted(found))


@cache
def complaint(device: torch.device) -> Complaint | None:
    """What keeps the native kernels from tensors of ``device``; None if nothing does."""
    kind = device.type
    if kind == "meta" or (kind == "cpu" and kind in native()):
        return None
    if _misfit:
        return Complaint(
            f"deslo_plugin._C does not fit torch {torch.__version__} ({_misfit})",
            "build it again with pip install --no-build-isolation (it needs torch 2.10), or leave it out with "
            "DESLO_NATIVE=off",
        )
    if torch.version.hip or kind not in ("cpu", "cuda"):
        return Complaint(f"no native kernels for {kind} tensors", "they are for the CPU and for NVIDIA's GPUs alone")
    if kind not in native():
        has = f" (deslo_plugin._C has those for {native()} alone)" if _module else ""
        return Complaint(
            f"no native kernels for {kind} tensors{has}", f"{BUILD.format(kind)} builds them or says why not"
        )
    return _cuda_complaint(device)


def _cuda_complaint(device: torch.device) -> Complaint | None:
    index = torch.cuda.current_device() if device.index is None else device.index
    module = require(_module)
    try:
        error, driver, runtime = module.cuda_status(index)
    except RuntimeError as failure:
        error, driver, runtime = str(failure), 0, 0
    if not error:
        return None
    again = BUILD.format("cuda")
    if error in OLD_DRIVER or runtime // 1000 > driver // 1000 > 0:
        return Complaint(
            f"the CUDA kernels were built with CUDA {_dotted(runtime)} and the driver is for CUDA {_dotted(driver)}",
            f"set CUDA_HOME to the toolkit that torch was built with (CUDA {torch.version.cuda}) and run {again}, or "
            "install a newer driver",
        )
    if error in NO_CODE:
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        return Complaint(
            f"the CUDA kernels have code for compute capability {module.architectures} and "
            f"{torch.cuda.get_device_name(index)} has {capability} ({error})",
            f"TORCH_CUDA_ARCH_LIST={capability} {again} builds them for it",
        )
    return Complaint(
        f"the CUDA kernels do not start on cuda:{index} ({error})",
        f"build them for this torch ({torch.__version__}) and driver: {again}",
    )


def settle(tensors: Iterable[Tensor]) -> None:
    """Before the first kernel runs on ``tensors``: says once for each kind of device that native kernels do not run on
    it, and sees that nothing tries to start one that cannot."""
    for device in {tensor.device for tensor in tensors}:
        _settle(device)


@cache
def _settle(device: torch.device) -> None:
    found = complaint(device)
    if found is None:
        return
    if device.type in native():
        _give_to_torch(device.type.upper())
    _say(device.type, found)


_said: set[str] = set()  # kinds of devices


def _say(kind: str, found: Complaint) -> None:
    if kind in _said:
        return
    _said.add(kind)
    log_rank0(
        f"deslo: {found.why}: updates run on {TORCHS}, several times slower; {found.do}",
        logging.WARNING if kind == "cuda" or _misfit else logging.INFO,
    )


def _give_to_torch(key: str) -> None:
    """Puts the references in the place of the native kernels of one dispatch key, for the rest of the process."""
    for operator in _operators:
        operator.library.impl(operator.name, operator.reference, key)


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
