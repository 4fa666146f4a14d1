"""Scripts and modules on ranks that are forked, as torchrun starts them: for what is asked of a script and not of its
launcher, without an interpreter for each rank that imports torch once more.

A rank has the arguments, the environment and the working folder that it is given, prints into files, and finds the
store of the one that launched it, as under torchrun: no port is guessed.
"""

import atexit
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.worlds import PLENTY_S, STARTED


class Launch:
    """``words`` is ``[script, argument, ...]`` or ``["-m", module, argument, ...]``, for ``size`` ranks; ``folder`` is
    where they print, and where they are unless ``cwd`` says another."""

    def __init__(self, words: Sequence[object], size: int, folder: Path, cwd: Path | None = None, **environ: str):
        self.folder = folder
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.store.port,
        }
        shared = dict(os.environ) | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"} | environ
        self.ranks = []
        for rank in range(size):
            given = shared | {name: str(value) for name, value in world.items()}
            given |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            args = ([str(word) for word in words], given, str(cwd or folder), str(self._printed(rank)))
            self.ranks.append(STARTED.Process(target=_run, args=args))
            self.ranks[-1].start()

    def wait(self, timeout: float = PLENTY_S) -> list[int | None]:
        """The exit status of each rank; kills those that have not come to their end."""
        until = time.monotonic() + timeout
        for each in self.ranks:
            each.join(max(0.0, until - time.monotonic()))
        status = [each.exitcode for each in self.ranks]
        for each in self.ranks:
            each.kill()
            each.join(timeout=10)
        return status

    def said(self, name: str) -> str:
        """What all ranks have printed to ``"out"`` or ``"err"``, in rank order."""
        printed = [self._printed(rank).with_suffix(f".{name}") for rank in range(len(self.ranks))]
        return "".join(each.read_text() for each in printed if each.exists())

    def _printed(self, rank: int) -> Path:
        return self.folder / f"rank-{id(self)}-{rank}"


def launched(words: Sequence[object], size: int, folder: Path, **options: object) -> tuple[str, str]:
    """(stdout, stderr) of ranks that must end well."""
    launch = Launch(words, size, folder, **options)
    status = launch.wait()
    assert status == [0] * size, f"{status}: {launch.said('err')[-3000:]}"
    return launch.said("out"), launch.said("err")


def _run(words: list[str], environ: Mapping[str, str], cwd: str, printed: str) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{printed}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    torch.set_num_threads(1)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
