"""The figures of one run, out of what its replicas wrote."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from deslo_plugin.telemetry.report.files import Record, read_replicas

LAST = 0.05  # share of the logged steps that the final loss is a mean of


@dataclass(frozen=True)
class Point:
    """After ``steps`` steps, ``tokens`` on all ranks together and ``seconds`` of training: the mean loss of the
    replicas."""

    steps: int
    tokens: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class Flight:
    """An average of a ``state`` on the first replica, in seconds of training; the last ``exposed`` of them were waited
    for."""

    state: str
    steps: int
    launch: float
    land: float
    exposed: float


@dataclass(frozen=True)
class Seen:
    """Drift of a state after ``steps`` steps: means over replicas and param groups."""

    steps: int
    distance: float
    cosine: float


class Run:
    """One run's figures. Raises ``ConfigError`` naming what is missing."""

    def __init__(self, path: Path):
        self.name, self._replicas = path.stem if path.is_file() else path.resolve().name, read_replicas(path)
        self.start = self._replicas[0].start
        self.replicas, self.replica_size = self.start["replicas"], self.start["replica_size"]

    @property
    def found(self) -> int:
        """Replicas whose files are here."""
        return len(self._replicas)

    @property
    def processes(self) -> int:
        """1 + restarts."""
        return self._replicas[0].processes

    @property
    def ended(self) -> bool:
        return all(replica.end for replica in self._replicas)

    @property
    def steps(self) -> int:
        """The last step of which anything is known."""
        first = self._replicas[0]
        return max(
            (each["steps"] for each in [*first.averages, *first.logs, *([first.end] if first.end else [])]), default=0
        )

    @property
    def switched(self) -> int | None:
        """The step after which the update changed (``optimizer.params.switch``); None if it did not."""
        switch = self._replicas[0].switch
        return None if switch is None else int(switch["steps"])

    @property
    def taken(self) -> int:
        """Steps that were taken in this folder."""
        first = self._replicas[0]
        if first.end and first.processes == 1:
            return first.end["taken"]
        return self.steps - (first.logs[0]["steps"] - 1 if first.logs else 0)

    @property
    def seconds(self) -> float:
        return max(replica.seconds for replica in self._replicas)

    @property
    def bytes(self) -> dict[str, int]:
        """State -> bytes that the first rank sent."""
        sent: dict[str, int] = defaultdict(int)
        for average in self._replicas[0].averages:
            for state, count in average["bytes"].items():
                sent[state] += count
        return dict(sent)

    @property
    def reduction(self) -> float | None:
        """Times fewer bytes than synchronous training; None if nothing was sent."""
        sent = sum(self.bytes.values())
        return self.taken * self.start["synchronous_bytes"] / sent if sent else None

    @property
    def exposed(self) -> list[float]:
        """Seconds that each replica waited for averages."""
        return [sum(average["exposed_s"] for average in replica.averages) for replica in self._replicas]

    @property
    def exposure(self) -> list[tuple[int, float]]:
        """(steps, seconds waited until then), means over replicas."""
        waited: dict[int, float] = defaultdict(float)
        for replica in self._replicas:
            for average in replica.averages:
                waited[average["steps"]] += average["exposed_s"] / self.found
        return list(zip(sorted(waited), accumulate(waited[steps] for steps in sorted(waited))))

    @property
    def losses(self) -> list[Point]:
        """By step; of those replicas that logged a finite loss there."""
        tokens = self._tokens()
        by_step: dict[int, list[Record]] = defaultdict(list)
        for replica in self._replicas:
            for log in replica.logs:
                if log.get("loss") is not None:
                    by_step[log["steps"]].append(log)
        return [
            Point(
                steps,
                tokens.get(steps, 0.0),
                fmean(each["seconds"] for each in logs),
                fmean(each["loss"] for each in logs),
            )
            for steps, logs in sorted(by_step.items())
        ]

    @property
    def tokens(self) -> float:
        return max(self._tokens().values(), default=0.0)

    @property
    def final_loss(self) -> float | None:
        """Mean of the last twentieth of the logged steps."""
        losses = [point.loss for point in self.losses]
        return fmean(losses[-max(1, round(LAST * len(losses))) :]) if losses else None

    @property
    def drift(self) -> dict[str, list[Seen]]:
        """By state. What was not finite is left out."""
        found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for replica in self._replicas:
            for average in replica.averages:
                for state, distance in average["distance"].items():
                    if distance is not None and average["cosine"][state] is not None:
                        found[state][average["steps"]].append((distance, average["cosine"][state]))
        return {
            state: [Seen(steps, *(fmean(each) for each in zip(*pairs))) for steps, pairs in sorted(by_step.items())]
            for state, by_step in found.items()
        }

    @property
    def flights(self) -> list[Flight]:
        return [
            Flight(state, each["steps"], each["seconds"] - seconds, each["seconds"], min(each["exposed_s"], seconds))
            for each in self._replicas[0].averages
            for state, seconds in each["in_flight_s"].items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """The figures of the table. ``exposed_s`` has an entry for each replica, ``last_drift`` a distance and a
        cosine."""
        names = (
            "replicas",
            "replica_size",
            "found",
            "processes",
            "ended",
            "steps",
            "switched",
            "taken",
            "seconds",
            "tokens",
            "final_loss",
            "bytes",
            "reduction",
        )
        last = {state: {"distance": seen[-1].distance, "cosine": seen[-1].cosine} for state, seen in self.drift.items()}
        return {name: getattr(self, name) for name in names} | {"exposed_s": self.exposed, "last_drift": last}

    def _tokens(self) -> dict[int, float]:
        """Steps -> tokens of all ranks until then, as if replicas whose files are absent had seen as many."""
        seen: dict[int, float] = defaultdict(float)
        for log in (log for replica in self._replicas for log in replica.logs):
            seen[log["steps"]] += (log.get("tokens") or 0) * self.replica_size * self.replicas / self.found
        return dict(zip(sorted(seen), accumulate(seen[steps] for steps in sorted(seen))))
