"""The processes of a benchmark on two nodes, seen from the one that leads it: started, asked, and ended in time."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.slow_link.network import ADDRESSES, DEVICE


class RankError(RuntimeError):
    """A rank raised, died, or did not answer in time; carries its traceback or the end of its log."""


class World:
    """``per_node`` single-threaded gloo ranks on each of ``nodes`` (network namespaces), node by node, that run
    ``module``.

    A context: at its end every process is gone, in peace if all went well, else killed.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        per_node: int,
        logs: Path,
        *,
        lifetime_s: float,
        module: str = "benchmarks.slow_link.rank",
    ):
        self.size = len(nodes) * per_node
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen] = []
        self._logs = [logs / f"{per_node}-per-node-rank-{rank}.log" for rank in range(self.size)]
        for rank, log in enumerate(self._logs):
            ours, theirs = Pipe()
            env = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(rank % per_node),
                "LOCAL_WORLD_SIZE": str(per_node),
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": str(29500 + per_node),
                "GLOO_SOCKET_IFNAME": DEVICE,
                "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_RUN_ID": "link",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            command = [
                "ip",
                "netns",
                "exec",
                nodes[rank // per_node],
                sys.executable,
                "-m",
                module,
                str(theirs.fileno()),
                str(lifetime_s),
            ]
            with log.open("w") as file:  # of its own session: Ctrl-C is for the leader, who then ends it
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=env,
                        pass_fds=[theirs.fileno()],
                        start_new_session=True,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
            theirs.close()
            self._pipes.append(ours)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.ask("leave", timeout=30)
                for process in self._processes:
                    process.wait(timeout=10)
        finally:
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.wait(timeout=10)

    def ask(self, what: str, *args: Any, timeout: float = 120) -> list[Any]:
        """The answer of every rank, in order, to a request that ``rank.py`` knows."""
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((what, args))
            except ConnectionError as gone:
                raise self._died(rank, what) from gone
        deadline = time.monotonic() + timeout
        return [self._answer(rank, what, deadline) for rank in range(self.size)]

    def _answer(self, rank: int, what: str, deadline: float) -> Any:
        try:
            if not self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                raise RankError(f"rank {rank} of {self.size}: no answer to {what!r} in time\n{self._tail(rank)}")
            answer, error = self._pipes[rank].recv()
        except (EOFError, ConnectionError) as gone:
            raise self._died(rank, what) from gone
        if error is not None:
            raise RankError(f"rank {rank} of {self.size} at {what!r}:\n{error}")
        return answer

    def _died(self, rank: int, what: str) -> RankError:
        return RankError(f"rank {rank} of {self.size} died at {what!r}\n{self._tail(rank)}")

    def _tail(self, rank: int) -> str:
        return "\n".join(self._logs[rank].read_text(errors="replace").splitlines()[-20:])
