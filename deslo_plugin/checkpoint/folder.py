"""A checkpoint's folder on its way: begun beside its name, put in its place when it is whole, and never in that of
others.

On a disk it is written as ``1200.part`` and renamed. An object store renames nothing: there each save writes a folder
of its own below ``1200``, and ``1200/deslo.current``, a small file that is replaced as a whole, says which one counts.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, cast

import torch.distributed as dist

from deslo_plugin.checkpoint.location import files_under, flush, in_object_store, location
from deslo_plugin.checkpoint.manifest import NAME, OLD, PART, read_manifest
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.errors import ConfigError
from deslo_plugin.log import log_rank0

CURRENT = "deslo.current"
SAVE = re.compile(r"save-[0-9a-f]{16}")  # the name of one save's folder in an object store


@dataclass(frozen=True)
class Destination:
    """A checkpoint that will be ``final``, and is written to ``part``."""

    final: Path
    part: Path

    def put_in_place(self) -> None:
        """Gives what was begun its name; cut off anywhere, one of both is left whole, and found by ``load``."""
        if in_object_store(self.final):
            write_whole(self.final / CURRENT, lambda file: file.write(self.part.name.encode()))
            with suppress(Exception):  # of any kind that a store's package has; the next save tries again
                for other in _saves(self.final) - {self.part.name}:
                    _remove(self.final / other)
            return
        old = self.final.with_name(self.final.name + OLD)
        if self.final.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.final.rename(old)
        try:
            self.part.rename(self.final)
        except OSError:
            with suppress(OSError):
                old.rename(self.final)
            raise
        shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def cleared_away_on_error(self, first: bool) -> Iterator[None]:
        """What was begun is removed by the ``first`` rank, as far as it can be, if the body raises."""
        try:
            yield
        except BaseException:
            if first:
                with suppress(Exception):
                    if _current(self.final) != self.part.name:
                        _remove(self.part)
            raise


def begin(final: Path, first: bool, world: dist.ProcessGroup | None) -> Destination:
    """Where to write, made by the ``first`` rank, empty and seen by every rank. Collective over ``world``. Raises
    ``ConfigError`` on every rank if ``final``, which it will replace, holds more than a checkpoint."""
    if in_object_store(final):
        own = f"save-{secrets.token_hex(8)}" if first else ""
        names = all_gather_by_rank(own, world).values() if world is not None else [own]
        return Destination(final, final / next(filter(None, names)))
    to = Destination(final, final.with_name(final.name + PART))
    with to.cleared_away_on_error(first):
        all_or_none(lambda: _begin(to) if first else None, world)
        all_or_none(lambda: to.part.stat(), world)  # a folder that not all ranks see would hold a part of the state
    return to


def _begin(to: Destination) -> None:
    final = to.final
    if final.is_dir():
        _expect_checkpoint(final)
    elif final.exists():
        raise ConfigError(f"save({str(final)!r})", "a folder to write, or to replace", "a file", "give another path")
    shutil.rmtree(to.part, ignore_errors=True)
    to.part.mkdir(parents=True)


def found(path: str | Path) -> Path:
    """The folder of the checkpoint ``path``, or of the one that it was about to replace when it was cut off."""
    path = location(path)
    if (current := _current(path)) is not None:
        return path / current
    old = path.with_name(path.name + OLD) if path.name else path
    if not in_object_store(path) and not path.exists() and old.exists():
        log_rank0(f"deslo: {path} was being replaced when it was cut off; loading the one before, {old}")
        return old
    return path


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the most steps among the subfolders of ``folder``, or None: what a restart loads.

    Looks at what is there now: call it on one rank and tell the others, or before training has begun to save.
    """

    def age(path: Path) -> tuple[int, float]:
        own = found(path)
        return read_manifest(own).steps, (own / NAME).stat().st_mtime

    return max(complete(folder), key=age, default=None)


def complete(folder: str | Path) -> list[Path]:
    """The checkpoints among the subfolders of ``folder``."""
    of = location(folder)
    files = [file for name in (NAME, CURRENT) for file in of.glob(f"*/{name}")]
    folders = {str(file.parent): file.parent for file in files if not file.parent.name.endswith((PART, OLD))}
    if in_object_store(of):  # of a checkpoint, the saves in it are none
        folders = {name: each for name, each in folders.items() if not SAVE.fullmatch(each.name)}
    return [folders[name] for name in sorted(folders)]


def write_whole(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """What ``write`` writes takes the place of ``file`` once it is on the disk; if that fails, what was there stays."""
    if in_object_store(file):  # which takes what was written so far, if a file that is open there meets an error
        with NamedTemporaryFile() as local:
            write(cast(IO[bytes], local))
            local.flush()
            cast(Any, file).fs.put_file(local.name, cast(Any, file).path)
        return
    part = file.with_name(file.name + PART)
    try:
        with part.open("wb") as content:
            write(content)
            flush(content)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _current(path: Path) -> str | None:
    """The save that counts, where one says so; also of what was copied from a store to a disk."""
    try:
        name = (path / CURRENT).read_bytes().decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not SAVE.fullmatch(name):
        raise ConfigError(
            str(path / CURRENT), "the name of a save beside it", repr(name[:40]), "take another checkpoint"
        )
    return name


def _saves(final: Path) -> set[str]:
    return {name.split("/", 1)[0] for name in files_under(final) if SAVE.fullmatch(name.split("/", 1)[0])}


def _remove(folder: Path) -> None:
    if not in_object_store(folder):
        return shutil.rmtree(folder, ignore_errors=True)
    of: Any = folder
    if files_under(folder):
        of.fs.rm(of.path, recursive=True)


def _expect_checkpoint(final: Path) -> None:
    where = f"save({str(final)!r})"
    if Path(os.getcwd()).is_relative_to(final.resolve()):
        raise ConfigError(
            where,
            "a folder of its own",
            "the working folder, which a save would replace",
            "give the name of a new folder in it",
        )
    files, named = files_under(final), []
    with suppress(OSError, ValueError, KeyError, TypeError):
        named = json.loads((final / NAME).read_bytes())["files"]
    others = [name for name in files if name not in named and name != NAME]
    if others:
        raise ConfigError(
            where,
            "a new folder, or a checkpoint to replace",
            f"a folder that also holds {others[0]!r}, which would be lost",
            "give the name of a new folder in it, or move that away",
        )
