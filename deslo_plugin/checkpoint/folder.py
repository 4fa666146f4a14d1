"""A checkpoint's folder on its way: begun beside its name, put in its place when it is whole, and never in that of
others."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from deslo_plugin.checkpoint.manifest import NAME, OLD, PART, files_in
from deslo_plugin.errors import ConfigError
from deslo_plugin.log import log_rank0


def part_of(final: Path) -> Path:
    return final.with_name(final.name + PART)


def begin(final: Path) -> None:
    """Makes an empty folder to write to. Raises ``ConfigError`` if ``final``, which it will replace, holds more than a
    checkpoint."""
    if final.is_dir():
        _expect_checkpoint(final)
    elif final.exists():
        raise ConfigError(f"save({str(final)!r})", "a folder to write, or to replace", "a file", "give another path")
    part = part_of(final)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def put_in_place(final: Path) -> None:
    """Gives what was begun its name; cut off anywhere, one of both is left whole, and found by ``load``."""
    part, old = part_of(final), final.with_name(final.name + OLD)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        part.rename(final)
    except OSError:
        with suppress(OSError):
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def cleared_away_on_error(final: Path, first: bool) -> Iterator[None]:
    """What was begun is removed by the ``first`` rank, as far as it can be, if the body raises."""
    try:
        yield
    except BaseException:
        if first:
            shutil.rmtree(part_of(final), ignore_errors=True)
        raise


def found(path: Path) -> Path:
    """``path``, or the checkpoint that it was about to replace when it was cut off."""
    old = path.with_name(path.name + OLD) if path.name else path
    if not path.exists() and old.exists():
        log_rank0(f"deslo: {path} was being replaced when it was cut off; loading the one before, {old}")
        return old
    return path


def write_whole(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """What ``write`` writes takes the place of ``file`` once it is on the disk; if that fails, what was there stays."""
    part = file.with_name(file.name + PART)
    try:
        with part.open("wb") as content:
            write(content)
            content.flush()
            os.fsync(content.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _expect_checkpoint(final: Path) -> None:
    where = f"save({str(final)!r})"
    if Path(os.getcwd()).is_relative_to(final.resolve()):
        raise ConfigError(
            where,
            "a folder of its own",
            "the working folder, which a save would replace",
            "give the name of a new folder in it",
        )
    files, named = files_in(final), []
    with suppress(OSError, ValueError, KeyError, TypeError):
        named = json.loads((final / NAME).read_bytes())["files"]
    others = [name for name in files if name not in named]
    if others:
        raise ConfigError(
            where,
            "a new folder, or a checkpoint to replace",
            f"a folder that also holds {others[0]!r}, which would be lost",
            "give the name of a new folder in it, or move that away",
        )
