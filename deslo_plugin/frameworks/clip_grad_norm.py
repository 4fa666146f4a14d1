"""The norm of a replica's gradient, however its ranks share the model, and clipping by it."""

from collections.abc import Mapping
from math import isinf

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deslo_plugin.attachment import Attachment, attachment_of
from deslo_plugin.checks.module_wrappers import bare
from deslo_plugin.comm.process_groups import reachable
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.local_tensors import local


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales the gradients of ``model`` to a norm of at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does,
    where that raises or sees a part: parameters on several meshes, DTensors beside plain ones, another stage of a
    pipeline or other experts on each rank.

    Args:
        model: one that ``attach`` was called with.
        max_norm: the largest norm that stays as it is.
        norm_type: which norm, "inf" for the largest element.
        error_if_nonfinite: raises ``RuntimeError`` for a norm that is NaN or infinite, on every rank of the replica.

    Returns the norm before clipping of the gradient of the whole replica, each element counted once: float32 without
    dimensions, to the bit the same on its ranks. Collective over the ranks of a replica; nothing crosses replicas.
    Raises ``ConfigError`` for a model that nothing is attached to.
    """
    attachment, order = attachment_of(model), float(norm_type)
    if attachment is None or attachment.engine_steps:
        raise ConfigError(
            "clip_grad_norm_(model)",
            "a model of torch that attach was called with",
            type(model).__name__,
            'attach it first, or set "gradient_clipping" in the DeepSpeed JSON of an engine',
        )
    if order <= 0:
        raise ConfigError("clip_grad_norm_(norm_type=...)", "a number above 0", repr(norm_type), "take 2.0 or inf")
    named = {name: param for name, param in bare(model).named_parameters() if param.grad is not None}
    gradients = local([param.grad for param in named.values() if param.grad is not None])
    gradients = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = _over_replica(_norms(named, gradients, order, attachment), order, attachment)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"clip_grad_norm_: expected a finite norm of order {order:g}, got {float(norm)}")
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return norm


def _norms(named: Mapping[str, Tensor], gradients: list[Tensor], order: float, attachment: Attachment) -> Tensor:
    """This rank's part: of the sum of powers, in which what several ranks of the replica hold counts once, or of the
    maximum."""
    size, holders = attachment.topology.replica_size, attachment.holders
    device = gradients[0].device if gradients else next(iter(attachment.averaging.groups[0]["params"])).device
    own = torch.zeros((), dtype=torch.float64, device=device)
    for (name, param), gradient in zip(named.items(), gradients):
        if not gradient.numel():
            continue
        norm = torch.linalg.vector_norm(gradient, order, dtype=torch.promote_types(gradient.dtype, torch.float32))
        norm = norm.to(device, torch.float64)
        if isinf(order):
            own = torch.maximum(own, norm)
        else:
            own += norm**order * _cuts(param) / holders.get(name, size)
    return own


def _cuts(param: Tensor) -> int:
    """Into how many parts a DTensor is cut over its mesh."""
    cuts = 1
    if isinstance(param, DTensor):
        for dimension, placement in enumerate(param.placements):
            cuts *= 1 if placement.is_replicate() else param.device_mesh.size(dimension)
    return cuts


def _over_replica(own: Tensor, order: float, attachment: Attachment) -> Tensor:
    """The norm by the parts of all ranks of a replica, which are added in the order of ranks: the same bits on each."""
    group = attachment.groups.shard
    if group is not None and group.size() > 1:
        sent = reachable(own, group)
        parts = [torch.empty_like(sent) for _ in range(group.size())]
        dist.all_gather(parts, sent, group=group)
        whole = torch.stack(parts).to(own.device)
        own = whole.max() if isinf(order) else whole.sum()
    return (own if isinf(order) else own ** (1 / order)).float()
