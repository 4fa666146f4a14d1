"""One model out of many replicas."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import singledispatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deslo_plugin.attachment import Attachment, attached_to, attachments_of
from deslo_plugin.checkpoint.model_names import saved_state
from deslo_plugin.checkpoint.replica_mean import averages, mean_of, whole
from deslo_plugin.checkpoint.state_dict_guard import last_average
from deslo_plugin.checkpoint.whole_model import with_other_parts
from deslo_plugin.errors import ConfigError, require

Parts = tuple[nn.Module, Callable[[Tensor], Tensor], dist.ProcessGroup | None, Attachment | None]
"""A module, what makes one of its tensors whole, over which ranks it has its mean, and the attachment."""


@singledispatch
def parts_of(model: Any) -> Parts:
    """Of a model that ``attach`` was called with; a framework with an engine of its own registers another for its
    type."""
    attachment = attachments_of(model, "averaged_state_dict")[0]
    return model, whole, attachment.peers, attachment


@torch.no_grad()
def averaged_state_dict(
    model: Any, *, as_trained: bool = False, of: nn.Module | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The model's state dict with the mean of all replicas' parameters on the CPU; training is not touched.

    It has the names that ``state_dict()`` of the plain model has, in their order, each name of a shared tensor among
    them: DDP, ``torch.compile`` and activation checkpointing leave no trace in them. Floating and complex buffers are
    averaged as well, whole numbers are those of the first rank, and what ``get_extra_state()`` gives is this rank's
    own.

    Where the ranks of a replica hold different parts, such as stages of a pipeline, every rank gets all of them.

    Args:
        model: a DeepSpeed engine, or a model that ``attach`` was called with. An engine without replicas has one model.
        as_trained: every tensor in the dtype that it has in the model, instead of float32 (float64 and complex ones
        stay).
        of: takes the mean of this instead, a module or a mapping of names to tensors that every rank has beside the
        model, with
            the same names and shapes: a moving average of the weights (``torch.optim.swa_utils.AveragedModel``), a
            momentum encoder, or any copy that each replica keeps for itself.

    With a torchft manager it is the last average of the parameters that was written (``"deslo": {"state_dict":
    "last_average"}``), and the ranks of one replica call it by themselves.

    Collective: call it on every rank of all replicas, never on one alone. Needs room for one whole tensor more on each
    device. Raises ``ConfigError`` for a model that nothing is attached to, and on ranks that others leave alone in it.
    """
    module, gather, world, attachment = parts_of(model)
    if attachment is not None and attachment.live:
        return _last_average(module, as_trained, of)
    live = dict(of) if isinstance(of, Mapping) else saved_state(module if of is None else of)
    gather = gather if of is None else whole
    means: dict[int, Any] = {}  # by identity: a tensor of several names is averaged once
    with nullcontext() if attachment is None else attachment.together("averaged_state_dict()"):
        for name, value in live.items():
            if id(value) not in means:
                dtype = value.dtype if averages(name, value) and as_trained else None
                means[id(value)] = mean_of(gather(value), world, dtype) if averages(name, value) else value
        state = {name: means[id(value)] for name, value in live.items()}
        in_parts = attachment is not None and attachment.holders
        return with_other_parts(state, require(attachment).groups) if in_parts else state


def _last_average(module: nn.Module, as_trained: bool, of: object) -> dict[str, Any]:
    """Of a replica that comes and goes. Collective over its ranks."""
    if of is not None:
        raise ConfigError(
            "averaged_state_dict(of=...)", "none with a torchft manager", "one", "remove it: a copy has no average"
        )
    last = last_average(module, attached_to(module), saved_state(module))
    return {
        name: mean_of(whole(value), None, value.dtype if as_trained else None) if averages(name, value) else value
        for name, value in last.items()
    }
