"""What a replica counts in an average: E_m[s] = sum_m w_m s_m / sum_m w_m, with w_m the samples that it has seen.

Ours, not in the papers, whose replicas all count alike (``deslo.replica_weights: "uniform"``). A state that is averaged
every K steps is the work of the K steps since it was averaged last, so w_m is what replica m has seen in those: each
state, on its own period, has weights of its own. A replica that leaves steps out or takes smaller batches counts less,
and one that has seen nothing takes over what the others have come to. Gradients of a synchronous warm-up, exports and
saves are equal means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.comm.transport import Quantized, Transport, Work
from deslo_plugin.config.reader import plain
from deslo_plugin.errors import AverageError, ConfigError

Saved = tuple[bool, float, dict[int, dict[int, float]]]


class Samples:
    """What this rank has told of the samples that it has seen, kept for as long as a period asks for it."""

    def __init__(self, wanted: bool):
        self.wanted, self._told = wanted, False
        self.forget()

    def forget(self) -> None:
        """After a load: what was seen before it is not known."""
        self._total = 0.0
        self._at: dict[int, dict[int, float]] = {}  # id of a param group -> completed steps -> the total then

    def saved(self, groups: Sequence[Mapping[str, Any]]) -> Saved | None:
        """All of it, by the places of param groups in ``groups``; None where nothing is ``wanted``."""
        at = {i: dict(self._at[id(group)]) for i, group in enumerate(groups) if id(group) in self._at}
        return (self._told, self._total, at) if self.wanted else None

    def load(self, groups: Sequence[Mapping[str, Any]], saved: Saved | None) -> None:
        """Goes on from what was ``saved``, if that is ``wanted``."""
        if self.wanted and saved:
            self._told, self._total, at = saved
            self._at = {id(groups[index]): dict(totals) for index, totals in at.items()}

    def record_samples(self, samples: float) -> None:
        """``samples`` are in the gradients of the step that this rank is taking; several calls in a step add up. Raises
        ``ConfigError`` for no number >= 0, and where they are not ``wanted``."""
        if not self.wanted:
            wanted, got = 'deslo.replica_weights "samples"', '"uniform"'
            raise ConfigError("record_samples(samples)", wanted, got, "set it, or remove the call")
        samples = plain(samples)
        if (
            isinstance(samples, bool)
            or not isinstance(samples, int | float)
            or not (isfinite(samples) and samples >= 0)
        ):
            raise ConfigError(
                "record_samples(samples)",
                "a number >= 0",
                repr(samples),
                "give the samples or tokens of this rank's batch",
            )
        self._total, self._told = self._total + samples, True

    def tick(self, group: Mapping[str, Any], steps: int) -> None:
        """Parameters of ``group`` have completed ``steps`` steps."""
        if not self.wanted:
            return
        longest = max(filter(None, group["sync_every"].values()), default=1)
        at = self._at.setdefault(id(group), {})
        at[steps] = self._total
        at.pop(steps - 2 * longest, None)  # averages may land up to a period after their launch

    def seen(self, group: Mapping[str, Any], steps: int, state: str) -> float:
        """Samples in the period of ``state`` that ended when ``steps`` were complete; NaN if this rank never told of
        any.

        After a load, of the steps since; one where nothing was stepped since, since nobody knows.
        """
        at = self._at.get(id(group), {})
        if steps not in at:
            return 1.0
        return at[steps] - at.get(steps - group["sync_every"][state], 0.0) if self._told else nan


@dataclass(frozen=True)
class _Weight:
    transport: Transport
    mine: float
    mean: Tensor
    work: Work

    def wait(self) -> None:
        self.work.wait()
        _expect_samples(self.transport, self.mine, float(self.mean[0]))


def _expect_samples(transport: Transport, mine: float, all_of_them: float) -> None:
    """Raises on every rank where a weight was not told by some rank, or nothing was seen by any."""
    if isnan(all_of_them):
        ranks = transport.culprits(isnan(mine))
        raise ConfigError(
            'deslo.replica_weights "samples"',
            "every rank to call record_samples(samples) before each step",
            f"nothing from rank(s) {ranks}",
            "call it, or remove deslo.replica_weights",
        )
    if all_of_them == 0:
        raise AverageError(
            "average over replicas: expected samples (record_samples) on some replica since the last one, got "
            "none on any; nothing of this average was written"
        )


@dataclass(frozen=True)
class WeighedBucket:
    """``work`` of the quantised ``bucket``, in which this replica counts what it has seen, ``mine`` of it this
    rank."""

    transport: Transport
    mine: float
    bucket: Quantized
    work: Work

    def wait(self) -> None:
        self.work.wait()
        _expect_samples(self.transport, self.mine, float(self.bucket.weights.sum()))


@dataclass(frozen=True)
class _Weighted:
    weight: _Weight
    chunk: Tensor
    work: Work

    def wait(self) -> None:
        self.work.wait()
        self.chunk.div_(self.weight.mean[0])


def start_weighted(
    average: Transport, mine: float, chunks: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> list[Work]:
    """Starts ``average`` of ``chunks`` with this replica's weight: E[w s] and E[w], which is one element more to send.

    ``mine`` is what this rank has seen, and its replica's weight the sum of its ranks'. On landing a weight that was
    told on no replica, or not at all on some rank, is an error on every rank. Collective over the replica's ranks.
    """
    weight = average.total(mine)
    mean = torch.full((average.divisor,), weight, dtype=dtype, device=device)
    first = _Weight(average, mine, mean, average.start(mean))
    return [first, *(_Weighted(first, chunk, average.start(chunk.mul_(weight))) for chunk in chunks)]
