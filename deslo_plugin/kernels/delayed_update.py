"""``torch.ops.deslo.land_``: an average that lands late, in one pass.

    land_(x, local, mean, factor):   x <- x + factor (mean - local)

``x`` is a state as it is now, float32, float64, bfloat16 or float16; ``local`` is what it was when its average was
launched, and ``mean`` is that average, both float32 or both float64 (for float64 states always). Computed in the dtype
of ``mean``, stored rounded to nearest. Tensors of one position are contiguous and of one shape, and nothing overlaps
``x``. Bad input raises ``ValueError`` naming the argument, before anything is written.

Here are the schema and the meaning; the native module adds CPU and CUDA kernels, which flush subnormal numbers to zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deslo_plugin.kernels.argument_checks import refuse, refuse_overlap
from deslo_plugin.kernels.availability import define, settle

WIDE = (torch.float32, torch.float64)

_library = torch.library.Library("deslo", "FRAGMENT")


def land_(x: Sequence[Tensor], local: Sequence[Tensor], mean: Sequence[Tensor], factor: float) -> None:
    """The operator; tensors of ``x`` that are not contiguous are copied first and written back."""
    rows = [tensor.contiguous() for tensor in x]
    settle(x[:1])
    torch.ops.deslo.land_(rows, local, mean, factor)
    for tensor, row in zip(x, rows):
        if tensor is not row:
            tensor.copy_(row)
    torch.autograd.graph.increment_version(list(x))  # a backward through old values must notice


def reference(x: Sequence[Tensor], local: Sequence[Tensor], mean: Sequence[Tensor], factor: float) -> None:
    """The operator made of torch's own."""
    _check(x, local, mean)
    for tensor, before, after in zip(x, local, mean):
        tensor.copy_((after - before).mul_(factor).add_(tensor))


def _check(x: Sequence[Tensor], local: Sequence[Tensor], mean: Sequence[Tensor]) -> None:
    """What csrc/torch/delayed_update_checks.h refuses, in its words."""
    if not x:
        refuse("x: expected one tensor or more, got an empty list")
    lists = {"x": x, "local": local, "mean": mean}
    for name, tensors in lists.items():
        if len(tensors) != len(x):
            refuse(f"{name}: expected {len(x)} tensors, got {len(tensors)}")
    for i in range(len(x)):
        for name, tensors in lists.items():
            _check_tensor(f"{name}[{i}]", tensors[i], f"x[{i}]", x[i], x[0].device)
        wanted, got = (str(tensor.dtype).removeprefix("torch.") for tensor in (mean[i], local[i]))
        if mean[i].dtype not in WIDE:
            refuse(f"mean[{i}]: expected float32 or float64, got {wanted}")
        if local[i].dtype != mean[i].dtype:
            refuse(f"local[{i}]: expected {wanted} as mean[{i}] is, got {got}")
        if x[i].dtype == torch.float64 and mean[i].dtype != torch.float64:
            refuse(f"x[{i}]: expected float32, bfloat16 or float16 with a float32 mean, got float64")
    refuse_overlap(lists, written={"x"})


def _check_tensor(name: str, tensor: Tensor, x_name: str, x: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        refuse(f"{name}: expected the device of x[0], got another")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        refuse(f"{name}: expected a contiguous tensor")
    if tensor.shape != x.shape:
        refuse(f"{name}: expected shape {list(x.shape)} of {x_name}, got {list(tensor.shape)}")
    if tensor.dtype not in (*WIDE, torch.bfloat16, torch.float16):
        refuse(f"{name}: expected float32, float64, bfloat16 or float16, got another dtype")


define(_library, "land_(Tensor(a!)[] x, Tensor[] local, Tensor[] mean, float factor) -> ()", reference)
torch.library.register_fake("deslo::land_", lambda x, local, mean, factor: None, lib=_library)
