"""``bucket://``: an object store for tests, that processes share, in a folder of this machine."""

import os
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    """Files by key: no folder must be made, and nothing can be renamed or linked. What was listed once is not asked for
    again, as with s3fs, unless this process has changed it."""

    protocol = ("bucket",)
    cachable = True

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return LocalFileSystem._strip_protocol(str(path).replace("bucket://", "/", 1))

    listed: dict[str, Any] = {}

    def invalidate_cache(self, path: Any = None) -> None:
        self.listed.clear()

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        path = self._strip_protocol(path)
        if path not in self.listed:
            self.listed[path] = super().ls(path, detail=True)
        return self.listed[path] if detail else [each["name"] for each in self.listed[path]]

    def rm(self, path: Any, **options: Any) -> None:
        self.listed.clear()
        super().rm(path, **options)

    def mkdir(self, path: str, **options: Any) -> None:
        raise AssertionError(f"a folder {path} in an object store")

    makedirs = mkdir

    def mv(self, one: str, other: str, **options: Any) -> None:
        raise AssertionError(f"{one} renamed in an object store")

    mv_file = mv

    def put_file(self, path1: str, path2: str, callback: Any = None, **options: Any) -> None:
        self.listed.clear()
        path2 = self._strip_protocol(path2)
        os.makedirs(self._parent(path2), exist_ok=True)
        self.cp_file(path1, path2)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode:
            self.listed.clear()
            os.makedirs(self._parent(path), exist_ok=True)
        return super()._open(path, mode, **options)


def known() -> None:
    """Makes ``bucket://`` known to this process."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
