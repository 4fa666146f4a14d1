"""``torch.ops.deslo.drift``: how far states have gone from their average over replicas, in one pass over both.

    drift(local, mean) -> sum (local - mean)^2, sum local mean, sum mean^2     over all elements, float64

``local`` may be float32, float64, bfloat16 or float16, ``mean`` float32 or float64; tensors of one position are
contiguous and of one shape. Bad input raises ``ValueError`` naming the argument. NaN or inf in ``mean`` makes the first
and the third sum NaN or inf: the pass that looks for them measures the drift as well.

Here are the schema and the meaning; the native module adds CPU and CUDA kernels. Those of the CPU flush subnormal
numbers to zero, sum fixed blocks in a fixed order, and so give the same bits for any number of threads and any
instruction set."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from deslo_plugin.kernels.argument_checks import refuse
from deslo_plugin.kernels.availability import define, settle

ROW = 1024  # elements that the reference sums as one
CACHED, QUEUED = 64, 1 << 14  # rows that it widens at a time: few for the caches of a CPU, many for the queue of a GPU

_library = torch.library.Library("deslo", "FRAGMENT")


@dataclass(frozen=True)
class Drift:
    """How far this replica's state x went from the mean over replicas between two averages.

    ``distance``: ||x - mean|| / ||mean||; 0 if both are zero, inf if only the mean is. ``cosine``: x . mean / (||x||
    ||mean||), the worker-to-global cosine by which MT-DAO (arXiv 2510.05361) tells how well momenta of the replicas
    stay aligned: above
    0.95 with a slow momentum, about 0.7 for Local ADOPT. 1 if x is the mean, also where both are zero; 0 if one of them
    is.

    Norms run over the tensors that this rank averaged at once: its own shard, of one param group.
    """

    distance: float
    cosine: float


def measure(local: Sequence[Tensor], mean: Sequence[Tensor]) -> Tensor:
    """The operator; tensors of ``local`` that are not contiguous are copied first."""
    settle(local[:1])
    return torch.ops.deslo.drift([tensor.contiguous() for tensor in local], mean)


def drift_of(sums: Sequence[float]) -> Drift:
    """What the sums of ``measure`` say. A finite ``distance`` proves that every element of the mean is finite."""
    difference, product, square = sums
    if difference == 0:
        return Drift(0.0, 1.0)
    norms = sqrt(max(difference + 2 * product - square, 0.0) * square)  # ||x|| ||mean||
    return Drift(
        distance=sqrt(difference / square) if square else inf,
        cosine=max(min(product / norms, 1.0), -1.0) if norms else 0.0,  # NaN stays NaN
    )


def reference(local: Sequence[Tensor], mean: Sequence[Tensor]) -> Tensor:
    """The operator made of torch's own."""
    _check(local, mean)
    total = torch.zeros(3, dtype=torch.float64, device=local[0].device)
    size = ROW * (CACHED if total.device.type == "cpu" else QUEUED)
    for x, m in zip(local, mean):
        for l_part, m_part in zip(x.reshape(-1).split(size), m.reshape(-1).split(size)):
            l, m = (
                torch.nn.functional.pad(part.double(), (0, -part.numel() % ROW)).view(-1, ROW)
                for part in (l_part, m_part)
            )
            total += torch.stack([(l - m).square().sum(1).sum(), (l * m).sum(1).sum(), m.square().sum(1).sum()])
    return total


def _check(local: Sequence[Tensor], mean: Sequence[Tensor]) -> None:
    """What csrc/torch/drift_checks.h refuses, in its words."""
    if not local:
        refuse("local: expected one tensor or more, got an empty list")
    if len(mean) != len(local):
        refuse(f"mean: expected {len(local)} tensors, got {len(mean)}")
    for i, (x, m) in enumerate(zip(local, mean)):
        for name, tensor in ((f"local[{i}]", x), (f"mean[{i}]", m)):
            if tensor.device != local[0].device:
                refuse(f"{name}: expected the device of local[0], got another")
            if tensor.layout != torch.strided or not tensor.is_contiguous():
                refuse(f"{name}: expected a contiguous tensor")
            if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                refuse(f"{name}: expected float32, float64, bfloat16 or float16, got another dtype")
        if m.dtype not in (torch.float32, torch.float64):
            refuse(f"mean[{i}]: expected float32 or float64, got {str(m.dtype).removeprefix('torch.')}")
        if m.shape != x.shape:
            refuse(f"mean[{i}]: expected shape {list(x.shape)} of local[{i}], got {list(m.shape)}")


define(_library, "drift(Tensor[] local, Tensor[] mean) -> Tensor", reference)
torch.library.register_fake(
    "deslo::drift", lambda local, mean: local[0].new_empty(3, dtype=torch.float64), lib=_library
)
