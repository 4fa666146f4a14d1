"""torchft's ``Manager`` as a transport: means over the replicas of the present quorum.

One *event* is everything that is due at the end of one step. It begins with a quorum and a roll call, between two
steps:

    who takes part?     the quorum; a replica that is behind takes over the whole state of one that is not, and it is
    the
                        others' state from then on: its own share of this event weighs nothing
    at the same step?   the roll call, one row from each replica; if clocks differ the event is void
    what is due         travels, as ever, under the forward and backward of the next step
    did it arrive?      ``should_commit`` once all has been waited for: everything is written, or nothing

Each rank of a replica has a manager and meets its peers, the same rank of every replica. What its managers tell it is
told to the replica's other ranks (``Inside``) before any of them goes by it: an event that failed for one is void for
all, and ``should_commit`` is the vote of all.

The manager's own step, by which torchft tells who is behind, is 1 + the clock of the last event that was written. So a
replica that missed it, or wrote one that the others did not wait for, is behind; one that refused it as all did is not.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from deslo_plugin.comm.progress import Progress
from deslo_plugin.comm.transport import SendsWhole
from deslo_plugin.errors import AverageError, ConfigError, require
from deslo_plugin.frameworks.live_inside import Inside
from deslo_plugin.frameworks.live_source import OneSource, Unread
from deslo_plugin.frameworks.live_state import SUBJECTS, Replica
from deslo_plugin.log import log_rank0

KEY = "deslo"  # of our state among what the manager heals


@dataclass
class _Share:
    """A chunk under way, of which this rank averages ``own``; ``wait`` leaves the mean in it, or anything if it did not
    arrive. Collective over the ranks of a replica that hold copies."""

    work: Any
    chunk: Tensor
    own: Tensor
    voices: float
    inside: Inside
    waited: bool = False

    def wait(self) -> None:
        if not self.waited:
            self.waited = True
            if self.chunk.is_cuda:  # torchft's time limit counts what is queued before its wait
                torch.cuda.current_stream(self.chunk.device).synchronize()
            self.work.wait()
            self.own.div_(self.voices)
            self.inside.gather_parts(self.chunk, self.own)


class LiveTransport(SendsWhole):
    """Means over the replicas of the present quorum (an ``Transport``).

    Args:
        manager: the ``torchft.Manager`` of this rank.
        inside: the ranks of this replica.
        unread: what of another replica's state could not be read.
        timeout_s: how long to wait for a quorum: longer than the time between two averages, which a latecomer waits
        for.
        device: of the tensors that travel.
    """

    progress: Progress | None = None

    def __init__(self, manager: Any, inside: Inside, unread: Unread, *, timeout_s: float, device: torch.device):
        self.manager, self.inside, self.timeout_s, self.device = manager, inside, timeout_s, device
        self.divisor = inside.divisor
        if inside.size > 1:
            manager._client = OneSource(manager._client, inside)
        self.replicas, self.rank, self.joined = 1, 0, False
        self._replaced, self._voices = False, 1.0
        self._unread = unread
        self._offered: Mapping[str, Any] | None = None  # another replica's state, which the manager has brought
        self._shares: list[_Share] = []
        self._verdict: bool | None = None  # whether what was started has arrived, once that is known

    def represent(self, replica: Replica, greet: Callable[[], object]) -> None:
        """``replica`` is what this process trains; ``greet`` is called once it is among the others."""
        self._replica, self._greet = replica, greet
        self.manager.register_state_dict_fn(KEY, self._offer, replica.state)

    def start_quorum(self) -> bool:
        while not self.joined:
            self._call_quorum(step=0)
            self.joined = self._replaced or self._found()
            if self.joined:
                self._greet()
                return self._replaced
        self._call_quorum()
        return self._replaced

    def start(self, chunk: Tensor) -> _Share:
        self._verdict = None
        if self._replaced:
            chunk.zero_()  # the one whose state this is brings it already
        own = self.inside.part(chunk)
        work = self.manager.allreduce(own, reduce_op=ReduceOp.SUM)
        self._shares.append(_Share(work, chunk, own, self._voices, self.inside))
        return self._shares[-1]

    def should_commit(self) -> bool:
        if self._verdict is None:
            for share in self._shares:
                share.wait()
            self._shares.clear()
            reason, self._verdict = self.manager.errored(), self.manager.should_commit()
            if self._verdict:
                self._set_step(1 + self._replica.steps)
            else:
                others = " or another rank of this one did not receive it" if self.inside.size > 1 else ""
                why = str(reason.original_exception).split(". ")[0] if reason else f"too few replicas are left{others}"
                log_rank0(
                    f"deslo: an average near step {self._replica.steps} did not arrive ({why}); nothing of it is "
                    "written, and training goes on to the next",
                    logging.WARNING,
                )
        return self._verdict

    def any(self, flag: bool) -> bool:
        """Of an event that has failed nothing is known: False on every rank, and the event is void."""
        return self.inside.any(flag) and not self._failed()

    def total(self, value: float) -> float:
        return self.inside.total(value)

    def culprits(self, flag: bool) -> list[int]:
        rows = self._exchange([float(self.inside.any(flag))]) or []
        return [rank for rank, (bad,) in enumerate(rows) if bad]

    def _failed(self) -> bool:
        """Whether this event has failed on any rank of this replica; then it is void on all of them. Collective over
        the replica's ranks."""
        failed = self.inside.any(self.manager.errored() is not None)
        if failed and not self.manager.errored():
            self.manager.report_error(RuntimeError("another rank of this replica did not receive it"))
        return failed

    def _offer(self, state: Mapping[str, Any]) -> None:
        self._offered = state

    def _take_over(self) -> bool:
        """Becomes the replica whose state was offered, if every rank was offered its part. Collective over the
        replica's ranks. Raises ``ConfigError`` on all of them, with nothing written, if it is of another kind."""
        offered, self._offered = self._offered, None
        if not self.inside.any(offered is not None or bool(self._unread)):
            return False
        self.inside.refuse(self._refuse_unread)
        if self.inside.any(offered is None) or self._failed():
            self.manager.report_error(RuntimeError("not every rank of this replica was sent the state to take over"))
            self._set_step(0)  # still behind
            return False
        state = require(offered)
        self.inside.refuse(lambda: self._replica.refuse_other(state))
        self._replica.take_over(state)
        return True

    def _refuse_unread(self) -> None:
        for error in self._unread:
            raise error

    def _call_quorum(self, step: int | None = None) -> None:
        """A new event: who takes part, and whether all stand at the same step."""
        self._replaced, self._verdict = False, None
        if step is not None:
            self._set_step(step)
        self.inside.gather(None)  # a rank that has died is missed here, and not waited for in the quorum
        try:
            self.manager.start_quorum(timeout=timedelta(seconds=self.timeout_s))
        except (TimeoutError, RuntimeError) as error:
            raise AverageError(
                f"quorum after step {self._replica.steps}: expected torchft's lighthouse to form one within "
                f"{self.timeout_s:g} s (deslo.timeout_s), got {str(error).splitlines()[0]!r}; see that it runs and "
                "that enough replicas are left"
            ) from error
        self._replaced = self._take_over()
        row = [float(not self._replaced), float(self._replica.steps), *map(float, self._replica.fingerprints())]
        self._roll = self._exchange(row)
        if self._roll is None:
            return
        self.replicas, self.rank = len(self._roll), self.manager.participating_rank()
        self._voices = sum(voice for voice, *_ in self._roll)
        clocks = [clock for _, clock, *_ in self._roll]
        if self.joined and len(set(clocks)) > 1:
            stand = ", ".join(f"{clock:g}" for clock in clocks)
            self.manager.report_error(RuntimeError(f"replicas stand at steps {stand}"))
            # whoever does is behind from now on, and takes over at the next quorum
            lags = self._replica.steps < max(clocks)
            self._set_step(0 if lags else max(1, self.manager.current_step()))

    def _found(self) -> bool:
        """The first meeting of replicas of which none has trained with another: whether all were there to the end.

        Raises ``ConfigError`` on every replica if they differ, or stand at different steps.
        """
        if self._roll is not None:
            self.inside.refuse(lambda: self._refuse_others(require(self._roll)))
        return self.should_commit()

    def _refuse_others(self, roll: Sequence[Sequence[float]]) -> None:
        for subject, *column in zip(("step to resume from", *SUBJECTS), *(row[1:] for row in roll)):
            different = [rank for rank, value in enumerate(column) if value != column[0]]
            if different:
                raise ConfigError(
                    subject,
                    "the same on every replica",
                    f"another on replica(s) {different} than on replica 0",
                    "start all of them with one config, one seed and one checkpoint",
                )

    def _exchange(self, row: Sequence[float]) -> list[list[float]] | None:
        """Everyone's ``row``, by replica; None if it did not arrive on every rank of this one."""
        if self._failed():
            return None
        table = torch.zeros(self.manager.num_participants(), len(row), dtype=torch.float64, device=self.device)
        table[self.manager.participating_rank()] = torch.tensor(row, dtype=torch.float64, device=self.device)
        self.manager.allreduce(table, reduce_op=ReduceOp.SUM).wait()
        rows = table.tolist()  # NCCL fails while it is waited for, and not before; its group knows that first
        if failed := self.manager._pg.errored():
            self.manager.report_error(failed)
        return None if self._failed() else rows

    def _set_step(self, step: int) -> None:
        self.manager.load_state_dict({"step": step, "batches_committed": self.manager.batches_committed()})


class MeanOfAll(SendsWhole):
    """``live`` for tensors of which each rank of a replica has a value of its own, such as running statistics: their
    mean over all ranks of all replicas."""

    progress: Progress | None = None

    def __init__(self, live: LiveTransport):
        self.live, self.divisor = live, live.divisor

    @property
    def replicas(self) -> int:
        return self.live.replicas

    def start(self, chunk: Tensor) -> _Share:
        self.live.inside.mean_(chunk)
        return self.live.start(chunk)

    def start_quorum(self) -> bool:
        return self.live.start_quorum()

    def should_commit(self) -> bool:
        return self.live.should_commit()

    def any(self, flag: bool) -> bool:
        return self.live.any(flag)

    def total(self, value: float) -> float:
        return self.live.total(value)

    def culprits(self, flag: bool) -> list[int]:
        return self.live.culprits(flag)
