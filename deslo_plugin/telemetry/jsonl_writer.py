"""A file of JSON objects, one to a line, that nobody waits for: a thread writes them.

Whole lines are appended once a second. A process that is killed loses the last second and leaves whole lines, but for
the last one if it dies within a write: ``JsonlWriter`` cuts that off when it goes on, and ``read`` leaves it out.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from stat import S_ISREG
from threading import Event, Thread
from typing import Any
from weakref import WeakValueDictionary, finalize

from deslo_plugin.log import log_rank0

EVERY = 1.0  # seconds between writes
CLOSE = 10.0  # seconds that the end of a process waits for its last lines
LONGEST = 1 << 20  # bytes of a line

_open: "WeakValueDictionary[Path, JsonlWriter]" = WeakValueDictionary()


class JsonlWriter:
    """Appends to ``path``, whose folder is made. Raises ``OSError`` if that fails, for a link, for a file that is open
    here already, and for one that no journal has begun: a ``first`` line begins with other keys.

    What fails later (a full disk) is said once, and the rest of the run is not written.
    """

    def __init__(self, path: Path, first: str = '{"kind":"start",'):
        path = path.parent.resolve() / path.name
        if path in _open:
            raise FileExistsError(f"{path} is being written by another attachment of this process")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _opened(path, first.encode())
        self.path, self._over = path, Event()
        self._waiting: list[Mapping[str, Any]] = []
        thread = Thread(target=_write_on, args=(path, file, self._waiting, self._over), daemon=True)
        thread.start()
        _open[path] = self
        self._close = finalize(self, _end, thread, self._over)  # at the latest when the process ends

    def write(self, record: Mapping[str, Any]) -> None:
        """Queues ``record`` for the thread; the caller changes it no more. The thread calls functions in it, for their
        values."""
        self._waiting.append(record)  # atomic, and wakes nobody

    def close(self) -> None:
        """Writes what is waiting."""
        self._close()
        _open.pop(self.path, None)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a journal, without a last line that is not whole. Raises ``ValueError`` naming a line that is
    none."""
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number}: no object")
            yield record


def _write_on(path: Path, file: int, waiting: list[Mapping[str, Any]], over: Event) -> None:
    ended, broken, whole = False, False, os.fstat(file).st_size
    while not ended:
        ended = over.wait(EVERY)
        count = len(waiting)
        records, waiting[:count] = waiting[:count], []
        if broken:
            continue
        try:
            lines = b"".join(map(_line, records))
            written = 0
            while written < len(lines):
                written += os.write(file, lines[written:])
            whole += written
        except Exception as error:  # whatever it is, training is worth more
            broken = True
            log_rank0(f"deslo: telemetry stops and training goes on: {path}: {error}", logging.WARNING, anywhere=True)
            with suppress(OSError):
                os.ftruncate(file, whole)
    os.close(file)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(record), separators=(",", ":")).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Numbers, names and containers of them; null for what is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if callable(value):
        value = value()
    return None if isinstance(value, float) and not isfinite(value) else value


def _opened(path: Path, first: bytes) -> int:
    """Opens ``path`` at the end of its last whole line. What lies there may be somebody else's, and is not cut then."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise FileExistsError(f"{path} is a link, which telemetry does not follow: remove it") from error
        raise
    head = os.pread(file, len(first), 0) if S_ISREG(os.fstat(file).st_mode) else b"no file"
    if head != first[: len(head)]:
        os.close(file)
        raise FileExistsError(
            f"{path} is no telemetry of deslo_plugin and stays as it is: move it, or give another folder"
        )
    os.ftruncate(file, _whole(file))
    return file


def _whole(file: int) -> int:
    """Bytes up to the end of the last whole line."""
    size = os.fstat(file).st_size
    start = max(0, size - LONGEST)
    return start + os.pread(file, LONGEST, start).rfind(b"\n") + 1


def _end(thread: Thread, over: Event) -> None:
    over.set()
    thread.join(CLOSE)
