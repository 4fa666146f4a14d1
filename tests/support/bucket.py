"""``bucket://``: an object store for tests, that processes share, in a folder of this machine."""

import os
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    """Files by key: no folder must be made, and nothing can be renamed or linked."""

    protocol = ("bucket",)
    cachable = True

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return LocalFileSystem._strip_protocol(str(path).replace("bucket://", "/", 1))

    def mkdir(self, path: str, **options: Any) -> None:
        raise AssertionError(f"a folder {path} in an object store")

    makedirs = mkdir

    def mv(self, one: str, other: str, **options: Any) -> None:
        raise AssertionError(f"{one} renamed in an object store")

    mv_file = mv

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode:
            os.makedirs(self._parent(path), exist_ok=True)
        return super()._open(path, mode, **options)


def known() -> None:
    """Makes ``bucket://`` known to this process."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
