"""How an average travels: ``Transport`` is the whole interface between the optimizer and its transport.

``SingleReplica`` is a world of one replica. ``replica_transport`` runs over ``torch.distributed``; in
``frameworks.live_transport`` replicas come and go."""

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm.progress import Progress
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.quantize import Format

Tensors = Sequence[Tensor]


class Work(Protocol):
    def wait(self) -> object:
        """Blocks until the chunk holds the mean over replicas."""


class Collective(Work, Protocol):
    """What ``dist.Work`` is, as far as an average needs it."""

    def is_completed(self) -> bool: ...


class Transport(Protocol):
    """The mean over replicas, for the ranks that hold one shard.

    ``divisor`` ranks of a replica split each chunk between them: chunks must be a multiple of it, and each of them
    sends ``1 / divisor`` of the bytes. ``progress`` is told of every launch and every wait, where somebody wants to
    know."""

    @property
    def divisor(self) -> int: ...

    @property
    def progress(self) -> Progress | None: ...

    def start(self, chunk: Tensor) -> Work:
        """Starts averaging the contiguous 1-D ``chunk`` in place; the caller does not touch it until ``wait``."""

    @property
    def replicas(self) -> int:
        """How many average."""

    def start_quantized(
        self, values: Tensors, bases: Tensors, errors: Tensors, format: Format, weight: float | None
    ) -> tuple["Quantized", Work]:
        """Starts the mean of ``values`` in few bits, as ``QuantizedBucket`` takes them."""

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


class Quantized(Protocol):
    """What a quantised average is made of and becomes, as ``QuantizedBucket`` says it."""

    @property
    def views(self) -> list[Tensor]: ...

    @property
    def chunks(self) -> Tensors: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def weights(self) -> Tensor: ...

    def carry(self, seats: Sequence[int]) -> None: ...


class LiveTransport(Transport, Protocol):
    """One whose replicas come and go: how many take part in the present quorum, and which of them this one is.
    ``joined``: whether this one has been among them."""

    joined: bool

    @property
    def rank(self) -> int: ...


class _Done:
    def wait(self) -> None:
        pass


class SendsWhole:
    """What transports that move no codes have in common."""

    def start_quantized(
        self, values: Tensors, bases: Tensors, errors: Tensors, format: Format, weight: float | None
    ) -> tuple[Quantized, Work]:
        raise ConfigError(
            "deslo.wire_dtype",
            f'"float32" with a {type(self).__name__}, which carries values as they are',
            "states in few bits",
            "remove it",
        )


class FixedMembership:
    """What transports between the same replicas from the first step to the last have in common: a failure is an
    error."""

    def start_quorum(self) -> bool:
        return False

    def should_commit(self) -> bool:
        return True


class SingleReplica(SendsWhole, FixedMembership):
    """One replica in one process: its own mean."""

    divisor: int = 1
    progress: Progress | None = None
    replicas: int = 1

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
