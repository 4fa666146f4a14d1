"""Whether all ranks were given the same thing, asked before the first step: a mismatch is an error, not a hang."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.errors import ConfigError, require

CHUNK = 1 << 22  # words of 8 bytes hashed at a time


def check_same_on_all_ranks(
    what: str,
    mine: Mapping[str, Any],
    *,
    do: str,
    among: Sequence[Sequence[int]] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Compares ``mine`` over all ranks, or over those of each list in ``among``; all ranks raise the same error or
    none.

    Args:
        what: where the setting comes from, the start of the message.
        mine: key -> value, compared by ``str``; keys name the difference.
        do: what the user should do about a difference.
        group: all ranks, by default the world.

    Raises ``ConfigError`` with the first key that differs, the two values, and the ranks.
    """
    mine = {key: str(value) for key, value in mine.items()}
    digest = all_gather_by_rank(hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest(), group)
    among = among or [list(digest)]
    if all(len({digest[rank] for rank in ranks}) == 1 for ranks in among):
        return
    everyone = all_gather_by_rank(mine, group)
    for first, *others in among:
        for key in dict.fromkeys(key for rank in [first, *others] for key in everyone[rank]):
            reference = everyone[first].get(key, "nothing")
            different = [rank for rank in others if everyone[rank].get(key, "nothing") != reference]
            if different:
                raise ConfigError(
                    f"{what} {key}",
                    f"{reference} on every rank, as on rank {first}",
                    f"{everyone[different[0]].get(key, 'nothing')} on rank(s) {different}",
                    do,
                )


def first_to_say(message: str) -> bool:
    """Whether no other rank of this world has said ``message`` before: what comes up on all is said once. Not
    collective."""
    try:
        store = require(dist.group.WORLD).get_group_store() if dist.is_initialized() else dist.HashStore()
        return store.add(f"deslo/said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except RuntimeError:
        return True  # the store has ended with its host


def digests(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name -> hash of the tensor's bytes, computed on its device."""
    return {name: f"{_hash(tensor):016x}" for name, tensor in named}


def _hash(tensor: Tensor) -> int:
    """Sum of 8-byte words times odd position weights, modulo 2^64: equal bytes, equal hash, on every device."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = raw.numel()
    for start in range(0, raw.numel(), 8 * CHUNK):
        part = raw[start : start + 8 * CHUNK]
        words = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(torch.int64)
        position = torch.arange(start // 8, start // 8 + words.numel(), device=words.device)
        total += int((words * (2 * position * 0x9E3779B97F4A7C1 + 1)).sum())
    return total % 2**64
