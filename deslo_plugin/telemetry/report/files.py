"""A run's files as one story: what a restart has gone over again replaces what it has gone over.

A process that starts in a folder appends to its file. Its first line of each kind says from where it went on: what was
written before and is of that step or later was thrown away by the restart, and is left out. Time stands still between
processes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from sys import maxsize
from typing import Any

from deslo_plugin.errors import ConfigError
from deslo_plugin.telemetry.jsonl_writer import read

Record = dict[str, Any]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _ranks(value: Any) -> bool:
    return type(value) is int and value >= 1


def _maybe(value: Any) -> bool:
    return value is None or _number(value)


def _by_state(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict) and isinstance(group.get("periods"), dict) for group in value
    )


KINDS: dict[str, dict[str, tuple[Callable[[Any], bool], bool]]] = {
    "start": {
        "at": (_number, True),
        "replicas": (_ranks, True),
        "replica_size": (_ranks, True),
        "synchronous_bytes": (_number, True),
        "groups": (_groups, True),
    },
    "average": {
        "at": (_number, True),
        "steps": (_whole, True),
        "exposed_s": (_number, True),
        "bytes": (_by_state(_number), True),
        "in_flight_s": (_by_state(_number), True),
        "distance": (_by_state(_maybe), True),
        "cosine": (_by_state(_maybe), True),
    },
    "log": {"at": (_number, True), "steps": (_whole, True), "loss": (_maybe, False), "tokens": (_maybe, False)},
    "switch": {"at": (_number, True), "steps": (_whole, True), "lr_factor": (_number, True)},
    "end": {"at": (_number, True), "steps": (_whole, True), "taken": (_whole, True)},
}
"""Kind of a line -> key -> (what fits, whether it must be there), of those that a report reads."""


@dataclass
class Replica:
    """What the first rank of a replica wrote: ``start`` as of the last process, ``averages`` and ``logs`` in order,
    each with ``seconds`` of training before it. ``switch`` is that of the run, once it was made, ``end`` that of the
    last process, if it came to one; ``processes`` wrote here."""

    start: Record
    averages: list[Record] = field(default_factory=list)
    logs: list[Record] = field(default_factory=list)
    switch: Record | None = None
    end: Record | None = None
    processes: int = 0

    @property
    def seconds(self) -> float:
        return max(
            (each["seconds"] for each in [*self.averages, *self.logs, *([self.end] if self.end else [])]), default=0.0
        )


def read_replicas(path: Path) -> list[Replica]:
    """Of a run's folder, by number, or of one file. Raises ``ConfigError`` that names what is missing or no
    telemetry."""
    files = (
        [path] if path.is_file() else sorted(path.glob("replica-*.jsonl"), key=lambda each: (len(each.name), each.name))
    )
    if not files:
        got = "a folder without them" if path.is_dir() else "nothing there"
        raise ConfigError(
            f"deslo report {path}",
            "a folder with replica-0.jsonl, ... of deslo.telemetry, or such a file",
            got,
            'check the path, and "deslo": {"telemetry": {"path": ...}} of the run',
        )
    return [_replica(file) for file in files]


def _replica(path: Path) -> Replica:
    replica = None
    try:
        for process in _processes(_checked(list(read(path)))):
            replica = _go_on(replica, process)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"deslo report {path}", "lines of deslo.telemetry", str(error), "give one that it wrote"
        ) from error
    if replica is None:
        raise ConfigError(
            f"deslo report {path}", "lines of deslo.telemetry", "none", "the run was over before it wrote any"
        )
    return replica


def _checked(records: Iterable[Record]) -> Iterable[Record]:
    """Raises ``ValueError`` for a line that telemetry does not write: which, and what in it."""
    for number, record in enumerate(records, start=1):
        kind = record.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"line {number}: kind {kind!r}")
        for key, (fits, needed) in KINDS[kind].items():
            if (key in record or needed) and not fits(record.get(key)):
                raise ValueError(f"line {number}: {key} {record.get(key)!r}")
        if kind == "average" and not record["distance"].keys() <= record["cosine"].keys():
            raise ValueError(f"line {number}: a distance without a cosine")
        yield record


def _processes(records: Iterable[Record]) -> Iterable[list[Record]]:
    """The records of each process; the first one is its start."""
    process: list[Record] = []
    for record in records:
        if record["kind"] == "start":
            if process:
                yield process
            process = []
        elif not process:
            raise ValueError("line 1: no start")
        process.append(record)
    if process:
        yield process


def _go_on(before: Replica | None, process: list[Record]) -> Replica:
    start, *records = process
    after = Replica(start, processes=1)
    averages, logs = ([each for each in records if each["kind"] == kind] for kind in ("average", "log"))
    if before is not None:
        after.processes += before.processes
        after.logs = _before(logs, before.logs)
        after.averages = _before([*averages, *logs], before.averages)
        after.switch = next(iter(_before([*averages, *logs], [before.switch] if before.switch else [])), None)
    passed = after.seconds
    for each in records:
        each["seconds"] = passed + each["at"] - start["at"]
    after.averages += averages
    after.logs += logs
    after.switch = next((each for each in records if each["kind"] == "switch"), after.switch)
    after.end = next((each for each in records if each["kind"] == "end"), None)
    return after


def _before(new: Iterable[Record], old: Iterable[Record]) -> list[Record]:
    first = min((each["steps"] for each in new), default=maxsize)
    return [each for each in old if each["steps"] < first]
