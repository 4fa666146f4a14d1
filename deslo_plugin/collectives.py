"""How an average travels: the only place where tensors go from one replica to another.

``Average`` is the whole interface between the optimizer and its transport. ``Alone`` is a world of one replica,
``ReplicaAverage`` runs over ``torch.distributed``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from deslo_plugin.plan import Topology


class AverageError(RuntimeError):
    """An average did not arrive: a replica died, hangs, or is too slow. Nothing of it was written."""


class Work(Protocol):
    def wait(self) -> object:
        """Blocks until the chunk holds the mean over replicas."""


class Average(Protocol):
    """The mean over replicas, for the ranks that hold one shard.

    ``divisor`` ranks of a replica split each chunk between them: chunks must be a multiple of it, and each of them
    sends ``1 / divisor`` of the bytes.
    """

    divisor: int

    def start(self, chunk: Tensor) -> Work:
        """Starts averaging the contiguous 1-D ``chunk`` in place; the caller does not touch it until ``wait``."""

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank of this replica. Collective over the replica's ranks."""

    def culprits(self, flag: bool) -> list[int]:
        """The ranks for which ``flag`` holds. Collective over all ranks of all replicas."""


class _Done:
    def wait(self) -> None:
        pass


class Alone:
    """One replica in one process: its own mean."""

    divisor = 1

    def start(self, chunk: Tensor) -> Work:
        return _Done()

    def any(self, flag: bool) -> bool:
        return flag

    def culprits(self, flag: bool) -> list[int]:
        return [0] if flag else []


@dataclass(frozen=True)
class Groups:
    """The process groups that this rank belongs to: its replica, its shard's peers in all replicas, and itself."""

    topology: Topology
    shard: dist.ProcessGroup
    replica: dist.ProcessGroup
    singleton: dist.ProcessGroup


def make_groups(topology: Topology, timeout_s: float) -> Groups:
    """Creates the groups; every rank must call it. ``timeout_s`` bounds each average, not the replica's own traffic."""

    def group(ranks: list[int], **options: object) -> dist.ProcessGroup:
        return dist.new_group(ranks, use_local_synchronization=True, **options)

    # averages must also carry tensors that the optimizer keeps on the CPU (offload) beside NCCL
    backend = "cpu:gloo,cuda:nccl" if "nccl" in dist.get_backend() else None
    return Groups(
        topology=topology,
        shard=group(topology.shard_group),
        replica=group(topology.replica_group, timeout=timedelta(seconds=timeout_s), backend=backend),
        singleton=group([topology.rank]),
    )


@dataclass(frozen=True)
class _Pending:
    average: "ReplicaAverage"
    work: dist.Work
    chunk: Tensor
    own: Tensor

    def wait(self) -> None:
        with self.average.named_errors():
            self.work.wait()
        if self.average.divisor > 1:
            parts = list(self.chunk.chunk(self.average.divisor))
            dist.all_gather(parts, self.own.clone(), group=self.average.groups.shard)


class ReplicaAverage:
    """Means over ``groups.replica``.

    ``split``: the ranks of a replica hold the same tensors (ZeRO stage 0, DDP), so that each averages 1/S of them
    between replicas and gathers the rest inside its replica, over the fast links.
    """

    def __init__(self, groups: Groups, *, timeout_s: float, split: bool = False):
        self.groups, self.timeout_s = groups, timeout_s
        self.divisor = groups.topology.replica_size if split else 1

    def start(self, chunk: Tensor) -> Work:
        own = chunk.chunk(self.divisor)[self.groups.topology.shard % self.divisor]
        with self.named_errors():
            work = dist.all_reduce(own, op=dist.ReduceOp.AVG, group=self.groups.replica, async_op=True)
        return _Pending(self, work, chunk, own)

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Turns what the backend says of a dead or late rank into an ``AverageError`` that says where to look."""
        try:
            yield
        except RuntimeError as error:
            raise AverageError(
                f"average over replicas: expected ranks {self.groups.topology.replica_group} to answer within "
                f"{self.timeout_s:g} s (deslo.timeout_s), got {str(error).splitlines()[0]!r}; look for the one that died "
                "or hangs, nothing of this average was written"
            ) from error

    def any(self, flag: bool) -> bool:
        if self.groups.topology.replica_size == 1:
            return flag
        flags: list[bool | None] = [None] * self.groups.topology.replica_size
        dist.all_gather_object(flags, flag, group=self.groups.shard)
        return any(flags)

    def culprits(self, flag: bool) -> list[int]:
        flags: list[bool | None] = [None] * self.groups.topology.world_size
        dist.all_gather_object(flags, flag)
        return [rank for rank, bad in enumerate(flags) if bad]
