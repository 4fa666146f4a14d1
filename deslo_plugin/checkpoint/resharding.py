"""FSDP2's parameters as shards again, before anything reads or writes them by name."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Makes every parameter this rank's shard again: a forward without gradients, ``unshard()`` or a forward that
    failed may leave it whole, as memory that is freed at any time and that nobody reads again. Whoever reads or writes
    parameters by ``named_parameters()`` calls it first. Not collective; nothing for a model that is not sharded."""
    for group in param_groups(model):
        group._to_sharded()  # FSDPModule.reshard() does nothing in a module whose forward has not ended


def param_groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            if hasattr(state, "_fsdp_param_groups"):
                yield from state._fsdp_param_groups
            elif state._fsdp_param_group is not None:  # torch 2.10 and 2.11
                yield state._fsdp_param_group
