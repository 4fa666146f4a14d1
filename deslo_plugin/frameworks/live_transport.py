"""torchft's ``Manager`` as a transport: means over the replicas of the present quorum.

One *event* is everything that is due at the end of one step. It begins with a quorum and a roll call, between two
steps:

    who takes part?     the quorum; a replica that is behind takes over the whole state of one that is not, and it is
    the
                        others' state from then on: its own share of this event weighs nothing
    at the same step?   the roll call, one row from each replica; if clocks differ the event is void
    what is due         travels, as ever, under the forward and backward of the next step
    did it arrive?      ``should_commit`` once all has been waited for: everything is written, or nothing

The manager's own step, by which torchft tells who is behind, is 1 + the clock of the last event that was written. So a
replica that missed it, or wrote one that the others did not wait for, is behind; one that refused it as all did is not.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp

from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checks.replica_checks import model_traits, optimizer_traits
from deslo_plugin.comm.consistency import digests
from deslo_plugin.comm.progress import Progress
from deslo_plugin.comm.transport import SendsWhole
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import AverageError, ConfigError
from deslo_plugin.log import log_rank0

SUBJECTS = ("config and param groups", "model", "initial values of the parameters")  # what founders must have alike
KEY = "deslo"  # of our state among what the manager heals


class Replica:
    """One whole replica: what a latecomer takes over, and by what replicas are told to be of one kind."""

    def __init__(self, model: nn.Module, averaging: StateAverager, config: Config):
        self.model, self.averaging = model, averaging
        self.settings = {key: str(value) for key, value in optimizer_traits(averaging, config).items()}
        self.shapes = {f"model parameter {name}": kind for name, kind in model_traits(model, lambda p: p.shape).items()}

    @property
    def steps(self) -> int:
        return self.averaging.steps

    def fingerprints(self) -> list[int]:
        """A hash of 52 bits, exact in float64, of each of ``SUBJECTS``; of values only before the first step."""
        values = {} if self.steps else digests(self.model.named_parameters())
        return [_hash(subject) for subject in (self.settings, self.shapes, values)]

    def state(self) -> dict[str, Any]:
        """Parameters, buffers, every state and clock of the optimizer, and what they are states of."""
        return {
            "traits": self.settings | self.shapes,
            "model": self.model.state_dict(),
            "optimizer": self.averaging.optimizer.state_dict(),
        }

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Becomes the replica that ``state`` is of. Raises ``ConfigError``, with nothing written, if it is of another
        kind."""
        mine, theirs = self.settings | self.shapes, state["traits"]
        for key in [*theirs, *mine]:
            if mine.get(key) != theirs.get(key):
                raise ConfigError(
                    key,
                    f"{theirs.get(key, 'nothing')} as in the replicas that train",
                    mine.get(key, "nothing"),
                    "start this replica with their config and model",
                )
        self.model.load_state_dict(state["model"])
        self.averaging.optimizer.load_state_dict(state["optimizer"])


@dataclass
class _Share:
    """A chunk under way; ``wait`` leaves the mean in it, or anything if it did not arrive."""

    work: Any
    chunk: Tensor
    voices: float
    waited: bool = False

    def wait(self) -> None:
        if not self.waited:
            self.waited = True
            if self.chunk.is_cuda:  # torchft's time limit counts what is queued before its wait
                torch.cuda.current_stream(self.chunk.device).synchronize()
            self.work.wait()
            self.chunk.div_(self.voices)


class LiveTransport(SendsWhole):
    """Means over the replicas of the present quorum (an ``Transport``).

    Args:
        manager: a ``torchft.Manager`` whose replica groups are of one rank.
        timeout_s: how long to wait for a quorum: longer than the time between two averages, which a latecomer waits
        for.
        device: of the tensors that travel.
    """

    divisor: int = 1
    progress: Progress | None = None

    def __init__(self, manager: Any, *, timeout_s: float, device: torch.device):
        self.manager, self.timeout_s, self.device = manager, timeout_s, device
        self.replicas, self.rank, self.joined = 1, 0, False
        self._replaced, self._voices = False, 1.0
        self._shares: list[_Share] = []
        self._verdict: bool | None = None  # whether what was started has arrived, once that is known

    def represent(self, replica: Replica, greet: Callable[[], object]) -> None:
        """``replica`` is what this process trains; ``greet`` is called once it is among the others."""
        self._replica, self._greet = replica, greet
        self.manager.register_state_dict_fn(KEY, self._take_over, replica.state)

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
        self._shares.append(_Share(self.manager.allreduce(chunk, reduce_op=ReduceOp.SUM), chunk, self._voices))
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
                why = str(reason.original_exception).split(". ")[0] if reason else "too few replicas are left"
                log_rank0(
                    f"deslo: an average near step {self._replica.steps} did not arrive ({why}); nothing of it is "
                    "written, and training goes on to the next",
                    logging.WARNING,
                )
        return self._verdict

    def any(self, flag: bool) -> bool:
        return flag

    def total(self, value: float) -> float:
        return value

    def culprits(self, flag: bool) -> list[int]:
        rows = self._exchange([float(flag)]) or []
        return [rank for rank, (bad,) in enumerate(rows) if bad]

    def _take_over(self, state: Mapping[str, Any]) -> None:
        self._replica.take_over(state)
        self._replaced = True

    def _call_quorum(self, step: int | None = None) -> None:
        """A new event: who takes part, and whether all stand at the same step."""
        self._replaced, self._verdict = False, None
        if step is not None:
            self._set_step(step)
        try:
            self.manager.start_quorum(timeout=timedelta(seconds=self.timeout_s))
        except (TimeoutError, RuntimeError) as error:
            raise AverageError(
                f"quorum after step {self._replica.steps}: expected torchft's lighthouse to form one within "
                f"{self.timeout_s:g} s (deslo.timeout_s), got {str(error).splitlines()[0]!r}; see that it runs and "
                "that enough replicas are left"
            ) from error
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
            for subject, *column in zip(("step to resume from", *SUBJECTS), *(row[1:] for row in self._roll)):
                different = [rank for rank, value in enumerate(column) if value != column[0]]
                if different:
                    raise ConfigError(
                        subject,
                        "the same on every replica",
                        f"another on replica(s) {different} than on replica 0",
                        "start all of them with one config, one seed and one checkpoint",
                    )
        return self.should_commit()

    def _exchange(self, row: Sequence[float]) -> list[list[float]] | None:
        """Everyone's ``row``, by replica; None if it did not arrive."""
        if self.manager.errored():
            return None
        table = torch.zeros(self.manager.num_participants(), len(row), dtype=torch.float64, device=self.device)
        table[self.manager.participating_rank()] = torch.tensor(row, dtype=torch.float64, device=self.device)
        self.manager.allreduce(table, reduce_op=ReduceOp.SUM).wait()
        rows = table.tolist()  # NCCL fails while it is waited for, and not before; its group knows that first
        if failed := self.manager._pg.errored():
            self.manager.report_error(failed)
        return None if self.manager.errored() else rows

    def _set_step(self, step: int) -> None:
        self.manager.load_state_dict({"step": step, "batches_committed": self.manager.batches_committed()})


def _hash(subject: Mapping[str, str]) -> int:
    return int.from_bytes(hashlib.sha256(repr(sorted(subject.items())).encode()).digest()[:6], "big")
