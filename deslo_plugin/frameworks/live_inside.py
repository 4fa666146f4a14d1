"""How the ranks of one replica that comes and goes decide alike: each averages with its peers by a ``Manager`` of its
own, and what one of them sees fail has failed for all of them.

A rank that dies in here is an error on the others, as it is in FSDP2: a replica lives and dies as a whole."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank, device_of
from deslo_plugin.errors import ConfigError, require


class Inside:
    """The ranks of this replica. ``copies``: those of them that hold the same tensors, of which each averages its part
    and gathers the rest inside."""

    def __init__(self, groups: Groups, copies: dist.ProcessGroup | None):
        self.size, self.rank = groups.topology.replica_size, groups.topology.shard
        self._group, self._copies = groups.shard, copies
        self.divisor = copies.size() if copies else 1

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank. Collective over the replica's ranks, as all below."""
        if self.size == 1:
            return flag
        word = torch.full((1,), flag, dtype=torch.int32, device=device_of(self._group))
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._group)
        return bool(word)

    def total(self, value: float) -> float:
        """Sum of ``value``, added in the order of ranks."""
        return value if self.size == 1 else sum(map(float, self.gather(value)))

    def gather(self, value: Any) -> list[Any]:
        """Plain data, or a ``ConfigError``, of each rank."""
        return [value] if self.size == 1 else list(all_gather_by_rank(value, self._group).values())

    def refuse(self, check: Callable[[], object]) -> None:
        """Raises on every rank the ``ConfigError`` that ``check`` raises on any."""
        problem = None
        try:
            check()
        except ConfigError as error:
            problem = error
        for found in self.gather(problem):
            if found is not None:
                raise found

    def part(self, chunk: Tensor) -> Tensor:
        """What of ``chunk`` this rank averages."""
        return chunk.chunk(self.divisor)[self._copies.rank()] if self._copies else chunk

    def gather_parts(self, chunk: Tensor, own: Tensor) -> None:
        """Fills ``chunk`` with what each of ``copies`` has averaged, ``own`` being this rank's part."""
        if self._copies is not None:
            parts = [torch.empty_like(own) for _ in range(self.divisor)]
            dist.all_gather(parts, own.clone(), group=self._copies)
            torch.cat(parts, out=chunk)

    def mean_(self, chunk: Tensor) -> None:
        """``chunk`` becomes its mean over the ranks."""
        if self.size > 1:
            dist.all_reduce(chunk, group=require(self._group))
            chunk.div_(self.size)
