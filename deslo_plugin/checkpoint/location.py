"""Where a checkpoint lies: a folder on a disk that every rank sees, or a URL of an object store that fsspec knows."""

import io
import os
import re
from pathlib import Path
from typing import IO, Any, cast

from fsspec import available_protocols
from torch.distributed.checkpoint.filesystem import FileSystem

from deslo_plugin.errors import ConfigError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):(/|:)")


def location(path: str | os.PathLike[str]) -> Path:
    """``path`` as ``pathlib`` has it, and a URL such as ``s3://bucket/run/1200`` as ``universal_pathlib`` has it, whose
    paths know what is asked of a ``Path`` here. What other processes have written to the store by now is seen.

    Raises ``ConfigError`` for a URL where that package or the store's own, such as s3fs, is not installed, for a store
    that fsspec does not know or that does not open, for names that a store would take for patterns or for several
    stores, and for a URL that went through ``pathlib.Path``, which drops a slash of it.
    """
    if not in_object_store(path):
        scheme, text = URL.match(os.fspath(path)), os.fspath(path)
        if scheme is None or ("://" not in text and scheme[1].lower() not in available_protocols()):
            return Path(path)
        path = scheme[1].lower() + text[scheme.end(1) :]
    where, text = f"path {str(path)!r}", str(path)
    if "://" not in text:
        raise ConfigError(where, "a URL with two slashes, as text", "one without", "do not wrap it in pathlib.Path")
    if strange := next((each for each in ("::", "*", "?", "[") if each in text), None):
        raise ConfigError(
            where,
            "the URL of one folder in one store",
            f"{strange!r}, which fsspec does not take as it is",
            "rename it",
        )
    try:
        from upath import UPath

        found = UPath(path)
        found / "a name in it"  # which not every URL can have
        found.fs.invalidate_cache()
    except Exception as error:  # a store's own package raises what it likes
        raise ConfigError(
            where,
            "a store that fsspec and universal_pathlib reach",
            str(error),
            "pip install 'deslo-plugin[remote]' and the store's own package, such as s3fs, gcsfs or adlfs, or mend the "
            "URL or the store's settings",
        ) from error
    on_disk = found.protocol in ("", "file", "local")
    return Path(found.path) if on_disk else cast(Path, found)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Where ``path`` lies whatever the working folder will be."""
    found = location(path)
    return found if in_object_store(found) else Path(os.path.abspath(found))


def in_object_store(path: Any) -> bool:
    """There a file is whole or absent, and nothing is renamed."""
    return hasattr(path, "fs") and not isinstance(path, os.PathLike)


def make_folder(path: Path) -> None:
    """With those above it, where it is not there yet; a store has none."""
    if not in_object_store(path):
        path.mkdir(parents=True, exist_ok=True)


def files_under(folder: Path) -> list[str]:
    """Names of all files below ``folder``, links to folders among them, as they are now."""
    if in_object_store(folder):
        store, root = cast(Any, folder).fs, cast(Any, folder).path
        store.invalidate_cache()  # other ranks have written
        return sorted(str(name).removeprefix(root).lstrip("/") for name in store.find(root))
    found = []
    for root, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def flush(file: IO[bytes]) -> None:
    """What was written is on the disk when this returns. A store has it once the file is closed."""
    file.flush()
    try:
        number = file.fileno()
    except io.UnsupportedOperation:
        return
    os.fsync(number)


class Store(FileSystem):
    """How ``torch.distributed.checkpoint`` reads and writes a URL; torch's own takes every path for a local one."""

    def create_stream(self, path: Any, mode: str) -> Any:
        return path.open(mode)

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        new_path.write_bytes(path.read_bytes())
        path.unlink()

    def mkdir(self, path: Any) -> None:
        """A store has no folders."""

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()


def _raise(error: OSError) -> None:
    raise error
