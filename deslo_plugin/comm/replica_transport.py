"""Averages over ``torch.distributed``: the only place where a tensor goes from one replica to another."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm.exchange import exchange
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank, device_of, mark_broken, uses_nccl
from deslo_plugin.comm.progress import Progress
from deslo_plugin.comm.quantized import QuantizedBucket
from deslo_plugin.comm.transport import Collective, FixedMembership, Quantized, Tensors, Work
from deslo_plugin.errors import AverageError, require
from deslo_plugin.kernels.quantize import Format
from deslo_plugin.log import log_rank0

PEER_CHECK_INTERVAL_S = 1.0  # seconds of waiting
SAY_AFTER_S = 10.0  # seconds of waiting for a rank that has not come, and double that from one time to the next
ABORT_S = 5.0  # seconds that a communicator may take to let go


@dataclass(frozen=True)
class _Pending:
    transport: "ReplicaTransport"
    work: Collective
    chunk: Tensor
    own: Tensor
    launch: int
    at: float

    def wait(self) -> None:
        with self.transport.named_errors(self.launch, self.at):
            self._until_complete()
            self.work.wait()
        self.transport.gather_copies(self.chunk, self.own)

    def _until_complete(self) -> None:
        """Waits on the host. Whoever waits for long asks whether others have given up: of a ring only the neighbours of
        a rank that died notice it, and NCCL would end the process without a word."""
        start = asked = said = time.monotonic()
        patience = SAY_AFTER_S
        while not self.work.is_completed():
            now = time.monotonic()
            if self.chunk.is_cuda and now - self.at > self.transport.timeout_s:
                raise RuntimeError(f"no answer for {self.transport.timeout_s:g} s")
            if now - asked > PEER_CHECK_INTERVAL_S:
                asked = now
                self.transport.refuse_to_wait_in_vain(self.launch)
            if now - said > patience:
                said, patience = now, 2 * patience
                self.transport.say_who_is_late(self.launch, now - start)
            time.sleep(min((now - start) / 64, 0.05))


@dataclass(frozen=True)
class _Exchanged:
    pending: _Pending
    bucket: QuantizedBucket

    def wait(self) -> None:
        self.pending.wait()
        if self.bucket.errors:
            self.pending.transport.gather_copies(self.bucket.own.view(-1), self.bucket.rest.view(-1))


class ReplicaTransport(FixedMembership):
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
        self.progress = progress or Progress(groups.topology, require(groups.world))
        self.replicas = require(groups.replica).size()
        self.divisor, self.ranks = copies.size() if copies else 1, dist.get_process_group_ranks(groups.replica)

    def start(self, chunk: Tensor) -> Work:
        own = chunk.chunk(self.divisor)[self.copies.rank() if self.copies else 0]
        launch, at = self.progress.launches, time.monotonic()
        with self.named_errors(launch, at):
            work = self._all_reduce(own)
        return _Pending(self, work, chunk, own, launch, at)

    def start_quantized(
        self, values: Tensors, bases: Tensors, errors: Tensors, format: Format, weight: float | None
    ) -> tuple[Quantized, Work]:
        group = require(self.groups.replica)
        bucket = QuantizedBucket(
            values,
            bases,
            errors,
            format,
            weight,
            copies=self.divisor,
            copy=self.copies.rank() if self.copies else 0,
            replicas=self.replicas,
            replica=group.rank(),
        )
        launch, at = self.progress.launches, time.monotonic()
        with self.named_errors(launch, at):
            work = exchange(bucket, group, require(self.groups.world), self.timeout_s)
        gathered, own = bucket.gathered.view(-1), bucket.gathered[bucket.copy].view(-1)
        return bucket, _Exchanged(_Pending(self, work, gathered, own, launch, at), bucket)

    def _all_reduce(self, own: Tensor) -> Collective:
        """Starts the mean of ``own`` over the ranks of ``groups.replica``, in place."""
        return dist.all_reduce(own, op=dist.ReduceOp.AVG, group=self.groups.replica, async_op=True)

    @contextmanager
    def named_errors(self, launch: int, at: float) -> Iterator[None]:
        """Turns what the backend says of a dead or late rank into an ``AverageError`` that names it.

        ``launch`` is the number of the average, and ``at`` when it started, by ``time.monotonic``.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            mark_broken(require(self.groups.replica))
            who = self.progress.missing(self.ranks, launch, timed_out=time.monotonic() - at >= 0.9 * self.timeout_s)
            self._abort()
            raise AverageError(
                f"average over replicas: expected ranks {self.ranks} to answer within {self.timeout_s:g} s "
                f"(deslo.timeout_s), got {str(error).splitlines()[0]!r}; {who}; nothing of this average was written"
            ) from error

    def gather_copies(self, chunk: Tensor, own: Tensor) -> None:
        """Fills ``chunk`` with what each of the ranks that share it has averaged, ``own`` being this rank's part."""
        if self.divisor == 1:
            return
        if chunk.is_cuda and uses_nccl(self.copies):  # in place
            dist.all_gather_into_tensor(chunk, own, group=self.copies)
        else:
            dist.all_gather(list(chunk.chunk(self.divisor)), own.clone(), group=self.copies)

    def refuse_to_wait_in_vain(self, launch: int) -> None:
        """Raises ``RuntimeError`` if others will not bring average number ``launch`` any more, by what was seen of
        them."""
        if given_up := self.progress.given_up(self.ranks, launch):
            raise RuntimeError(f"rank(s) {given_up} gave up")
        if alone := self.progress.alone(self.ranks):
            raise RuntimeError(f"rank(s) {alone} in load_state_dict or add_param_group, which every rank must call")

    def say_who_is_late(self, launch: int, seconds: float) -> None:
        """Says which ranks have not come to average number ``launch``: the line stays, however the process ends."""
        if late := self.progress.late(self.ranks, launch):
            log_rank0(
                f"deslo: rank {self.groups.topology.rank} has waited {seconds:.0f} s in an average; {', '.join(late)}",
                logging.WARNING,
                anywhere=True,
            )

    def any(self, flag: bool) -> bool:
        if self.groups.topology.replica_size == 1:
            return flag
        word = torch.full((1,), flag, dtype=torch.int32, device=device_of(self.groups.shard))
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.groups.shard)
        return bool(word)

    def total(self, value: float) -> float:
        if self.groups.topology.replica_size == 1:
            return value
        # summed here in the order of ranks: how an all-reduce adds may depend on the links of a replica
        mine = torch.full((1,), value, dtype=torch.float64, device=device_of(self.groups.shard))
        everyone = mine.new_empty(self.groups.topology.replica_size)
        dist.all_gather_into_tensor(everyone, mine, group=self.groups.shard)
        return sum(everyone.tolist())

    def culprits(self, flag: bool) -> list[int]:
        return [rank for rank, bad in sorted(all_gather_by_rank(flag, self.groups.world).items()) if bad]

    def _abort(self) -> None:
        """Takes an NCCL average that waits for ever off the GPU: the interpreter could not end beside it."""
        if not uses_nccl(self.groups.replica):
            return

        def abort() -> None:
            with suppress(Exception):  # the error to tell is the one that led here
                require(self.groups.replica)._get_backend(torch.device("cuda")).abort()

        aborting = Thread(target=abort, daemon=True)
        aborting.start()
        aborting.join(ABORT_S)
