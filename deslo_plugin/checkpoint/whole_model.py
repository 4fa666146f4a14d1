"""One model out of the parts that the ranks of a replica hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.attachment import Attachment
from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank, reachable


def with_other_parts(state: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """``state`` of the whole model: the tensors that other ranks of the replica have beside those of this one, on the
    CPU, rank after rank in their order. Collective over the replica."""
    mine = {
        name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    everyone = all_gather_by_rank(mine, groups.shard)
    found: dict[str, Any] = {}
    for rank, named in everyone.items():
        for name, (dtype, shape) in named.items():
            if name not in found:
                found[name] = _sent(state, name, rank, torch.empty(shape, dtype=getattr(torch, dtype)), groups)
    return found | {name: value for name, value in state.items() if name not in found}


def _sent(state: Mapping[str, Any], name: str, rank: int, fresh: Tensor, groups: Groups) -> Tensor:
    own = rank == groups.topology.rank
    staged = reachable(state[name].contiguous() if own else fresh, groups.shard)
    dist.broadcast(staged.view(-1).view(torch.uint8), src=rank, group=groups.shard)
    return staged.to("cpu")


def names_of_all_parts(names: Mapping[str, str], attachment: Attachment) -> Mapping[str, str]:
    """``names`` of the whole model, rank after rank. Collective over all ranks where they hold different parts."""
    if not attachment.holders:
        return names
    everyone = all_gather_by_rank(dict(names), attachment.groups.world)
    return {name: place for each in everyone.values() for name, place in each.items()}


def refuse_other_numbers(numbers: Sequence[Mapping[str, float]], attachment: Attachment) -> None:
    """Raises ``ConfigError`` on every rank if param groups of different parts have different rates: a checkpoint keeps
    one list. Collective over all ranks where they hold different parts."""
    if attachment.holders:
        check_same_on_all_ranks(
            "save: param group",
            {f"{index}.{key}": value for index, each in enumerate(numbers) for key, value in each.items()},
            do="give the param groups of every part of the model the same rate, and set others after the load",
            group=attachment.groups.world,
        )
