"""How an average travels: the only place where tensors go from one replica to another.

``Transport`` is the whole interface between the optimizer and its transport. ``SingleReplica`` is a world of one
replica, ``ReplicaTransport`` runs over ``torch.distributed``; ``frameworks.torchft`` has one whose replicas come and
go."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm.progress import STORE_TIMEOUT_S, Progress
from deslo_plugin.comm.topology import Topology
from deslo_plugin.errors import AverageError, ConfigError

PEER_CHECK_INTERVAL_S = 1.0  # seconds of waiting


class Work(Protocol):
    def wait(self) -> object:
        """Blocks until the chunk holds the mean over replicas."""


class Transport(Protocol):
    """The mean over replicas, for the ranks that hold one shard.

    ``divisor`` ranks of a replica split each chunk between them: chunks must be a multiple of it, and each of them
    sends ``1 / divisor`` of the bytes. ``progress`` is told of every launch and every wait, where somebody wants to
    know."""

    divisor: int
    progress: Progress | None

    def start(self, chunk: Tensor) -> Work:
        """Starts averaging the contiguous 1-D ``chunk`` in place; the caller does not touch it until ``wait``."""

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank of this replica. Collective over the replica's ranks."""

    def total(self, value: float) -> float:
        """Sum of ``value`` over the ranks of this replica. Collective over them."""

    def culprits(self, flag: bool) -> list[int]:
        """The ranks for which ``flag`` holds. Collective over all ranks of all replicas."""

    def start_quorum(self) -> bool:
        """Agrees on who takes part, before the first step and at the end of each step after which something is due.

        True: this replica was not there or had fallen behind, and now holds the whole state of one that was not.
        """

    def should_commit(self) -> bool:
        """Whether all that was started since ``convene`` has arrived, asked once it was waited for; if not, nothing of
        it may be written."""


class _Done:
    def wait(self) -> None:
        pass


class Fixed:
    """What transports between the same replicas from the first step to the last have in common: a failure is an
    error."""

    def start_quorum(self) -> bool:
        return False

    def should_commit(self) -> bool:
        return True


class SingleReplica(Fixed):
    """One replica in one process: its own mean."""

    divisor, progress = 1, None

    def start(self, chunk: Tensor) -> Work:
        return _Done()

    def any(self, flag: bool) -> bool:
        return flag

    def total(self, value: float) -> float:
        return value

    def culprits(self, flag: bool) -> list[int]:
        return [0] if flag else []


def left_alone() -> bool:
    """Whether other processes train beside this one, which no transport connects with."""
    return dist.is_initialized() and dist.get_world_size() > 1


@dataclass(frozen=True)
class Groups:
    """The process groups that this rank belongs to: all replicas, its own, its shard's peers in all of them, and
    itself.

    They are None in a process that was started alone.
    """

    topology: Topology
    world: dist.ProcessGroup | None
    shard: dist.ProcessGroup | None
    replica: dist.ProcessGroup | None
    singleton: dist.ProcessGroup | None


_made: "WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Topology, float], Groups]]" = WeakKeyDictionary()


def make_groups(topology: Topology, timeout_s: float) -> Groups:
    """The groups, created once in a world, since each keeps threads and sockets; every rank of the topology must call
    it. ``timeout_s`` bounds each average, not the replica's own traffic."""
    made = _made.setdefault(dist.group.WORLD, {})
    if (topology, timeout_s) not in made:
        made[topology, timeout_s] = _create_groups(topology, timeout_s)
    return made[topology, timeout_s]


def _create_groups(topology: Topology, timeout_s: float) -> Groups:

    def group(ranks: list[int], **options: object) -> dist.ProcessGroup:
        return dist.new_group(ranks, use_local_synchronization=True, **options)

    # averages must also carry tensors that the optimizer keeps on the CPU (offload) beside NCCL
    backend = "cpu:gloo,cuda:nccl" if "nccl" in dist.get_backend() else None
    # NCCL ends the process once its time is over: not before it has been said who is late
    bound = timeout_s + (4 * STORE_TIMEOUT_S if backend else 0)
    everyone = topology.world_size == dist.get_world_size()
    return Groups(
        topology=topology,
        world=dist.group.WORLD if everyone else group(sorted(topology.ranks)),
        shard=group(topology.shard_group),
        replica=group(topology.replica_group, timeout=timedelta(seconds=bound), backend=backend),
        singleton=group([topology.rank]),
    )


@dataclass(frozen=True)
class _Pending:
    transport: "ReplicaTransport"
    work: dist.Work
    chunk: Tensor
    own: Tensor
    launch: int
    at: float

    def wait(self) -> None:
        with self.transport.named_errors(self.launch, self.at):
            self._until_complete()
            self.work.wait()
        if self.transport.divisor > 1:
            parts = list(self.chunk.chunk(self.transport.divisor))
            dist.all_gather(parts, self.own.clone(), group=self.transport.copies)

    def _until_complete(self) -> None:
        """Waits on the host. Whoever waits for long asks whether others have given up: of a ring only the neighbours of
        a rank that died notice it, and NCCL would end the process without a word."""
        start = asked = time.monotonic()
        while not self.work.is_completed():
            now = time.monotonic()
            if self.chunk.is_cuda and now - self.at > self.transport.timeout_s:
                raise RuntimeError(f"no answer for {self.transport.timeout_s:g} s")
            if now - asked > PEER_CHECK_INTERVAL_S:
                asked = now
                if given_up := self.transport.progress.given_up(self.transport.ranks, self.launch):
                    raise RuntimeError(f"rank(s) {given_up} gave up")
                if alone := self.transport.progress.alone(self.transport.ranks):
                    raise RuntimeError(
                        f"rank(s) {alone} in load_state_dict or add_param_group, which every rank must call"
                    )
            time.sleep(min((now - start) / 64, 0.05))


class ReplicaTransport(Fixed):
    """Means over ``groups.replica``.

    ``copies``: the group of those ranks of this replica that hold the same tensors (all of them under ZeRO stage 0 and
    DDP). Each averages its part of them between replicas and gathers the rest inside, over the fast links.
    ``progress``: that of another average of the same attachment, which launches in one order with this one.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        timeout_s: float,
        copies: dist.ProcessGroup | None = None,
        progress: Progress | None = None,
    ):
        self.groups, self.timeout_s, self.copies = groups, timeout_s, copies
        self.progress = progress or Progress(groups.topology, groups.world)
        self.divisor, self.ranks = copies.size() if copies else 1, dist.get_process_group_ranks(groups.replica)

    def start(self, chunk: Tensor) -> Work:
        own = chunk.chunk(self.divisor)[self.copies.rank() if self.copies else 0]
        launch, at = self.progress.launches, time.monotonic()
        with self.named_errors(launch, at):
            work = self._all_reduce(own)
        return _Pending(self, work, chunk, own, launch, at)

    def _all_reduce(self, own: Tensor) -> dist.Work:
        """Starts the mean of ``own`` over the ranks of ``groups.replica``, in place."""
        return dist.all_reduce(own, op=dist.ReduceOp.AVG, group=self.groups.replica, async_op=True)

    @contextmanager
    def named_errors(self, launch: int, at: float) -> Iterator[None]:
        """Turns what the backend says of a dead or late rank into an ``AverageError`` that names it.

        ``launch`` is the number of the average, and ``at`` when it started, by ``time.monotonic``.
        """
        try:
            yield
        except RuntimeError as error:
            who = self.progress.missing(self.ranks, launch, timed_out=time.monotonic() - at >= 0.9 * self.timeout_s)
            raise AverageError(
                f"average over replicas: expected ranks {self.ranks} to answer within {self.timeout_s:g} s "
                f"(deslo.timeout_s), got {str(error).splitlines()[0]!r}; {who}; nothing of this average was written"
            ) from error

    def any(self, flag: bool) -> bool:
        if self.groups.topology.replica_size == 1:
            return flag
        return any(all_gather_by_rank(flag, self.groups.shard).values())

    def total(self, value: float) -> float:
        if self.groups.topology.replica_size == 1:
            return value
        return sum(all_gather_by_rank(value, self.groups.shard).values())

    def culprits(self, flag: bool) -> list[int]:
        return [rank for rank, bad in sorted(all_gather_by_rank(flag, self.groups.world).items()) if bad]


def all_gather_by_rank(value: Any, group: dist.ProcessGroup | None = None) -> dict[int, Any]:
    """Global rank -> its ``value``, over ``group`` or the world. Collective.

    A value is what JSON can hold, or a ``ConfigError``: nothing that a peer sends is run. Tuples come back as lists,
    and keys as strings. Raises ``TypeError`` for anything else. (torch's object collectives unpickle, and need numpy.)
    """
    text, device = json.dumps(value, default=_error_as_text).encode(), _device_of(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(text)], device=device), group=group)
    own = torch.zeros(max(map(int, lengths)), dtype=torch.uint8, device=device)
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(texts, own, group=group)
    values = [_read(each[: int(length)]) for each, length in zip(texts, lengths)]
    return dict(zip(dist.get_process_group_ranks(group), values))


def _device_of(group: dist.ProcessGroup | None) -> str:
    """Where tensors of ``group`` may be: on the host, if its backend reaches there."""
    devices = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]
    return "cpu" if "cpu" in devices else devices[0]


def _error_as_text(error: Any) -> dict[str, Any]:
    if not isinstance(error, ConfigError):
        raise TypeError(f"all_gather_by_rank: expected plain data or a ConfigError, got {type(error).__name__}")
    return {"ConfigError": error.__reduce__()[1]}


def _read(text: Tensor) -> Any:
    content = bytearray(len(text))
    torch.frombuffer(content, dtype=torch.uint8).copy_(text)
    return json.loads(content, object_hook=_error_of)


def _error_of(found: dict[str, Any]) -> Any:
    return ConfigError(*found["ConfigError"]) if [*found] == ["ConfigError"] else found
