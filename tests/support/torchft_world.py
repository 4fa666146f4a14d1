"""Replicas that come and go, as processes: started, doomed and watched, with the lighthouse that they meet by.

A replica of several ranks is a process for each of them; one that fails takes the others with it, as under torchrun."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.torchft_jobs import LONGEST, lighthouse, serve
from tests.support.worlds import STARTED


class Replicas:
    """Replicas of one job, and the lighthouse that they know each other by."""

    def __init__(self, folder: Path, *, ranks: int = 1, least: int = 2, **common: Any) -> None:
        self.folder, self.ranks, self.least, self.common = folder, ranks, least, common
        self.processes, self.lives = {}, 0
        self.lighthouse = lighthouse(least)

    def start(self, *names: str, **own: Any) -> None:
        self.lives += 1
        for name in names:
            job = {"name": name, "folder": str(self.folder), "lighthouse": self.address, "timeout_s": 3, "pace": 0.01}
            job |= {"ranks": self.ranks, "least": self.least, "life": self.lives, "kind": "bare"} | self.common | own
            for rank, key in enumerate(self.keys(name)):
                self.processes[key] = STARTED.Process(
                    target=serve, args=(job | {"key": key, "rank": rank},), daemon=True
                )
                self.processes[key].start()

    def keys(self, *names: str) -> list[str]:
        """The processes of these replicas."""
        return [f"{name}.{rank}" if rank else name for name in names for rank in range(self.ranks)]

    def kill(self, name: str) -> None:
        """All ranks of a replica at once."""
        for key in self.keys(name):
            self.processes[key].kill()

    def reap(self) -> None:
        """Ends the ranks of replicas of which one rank has failed."""
        for name in {key.split(".")[0] for key in self.processes}:
            own = [self.processes[key] for key in self.keys(name)]
            if any(process.exitcode for process in own):
                for process in own:
                    process.kill()

    @property
    def address(self) -> str:
        return f"http://localhost:{self.lighthouse.address().rsplit(':', 1)[1]}"

    def ended(self, *names: str) -> bool:
        """Whether all of them have ended, every rank of them."""
        return all(not self.processes[key].is_alive() for key in self.keys(*names))

    def error(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()

    def lines(self, name: str) -> list[dict[str, Any]]:
        log = self.folder / f"{name}.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def trained(self, name: str) -> list[dict[str, Any]]:
        """A line for each step of ``name``, over all its lives."""
        return [line for line in self.lines(name) if "loss" in line]

    def clock(self, *names: str) -> int:
        """The step that all of ``names`` have come to."""
        return min(max([0, *(line["steps"] for line in self.trained(name))]) for name in names)

    def back(self, name: str, since: float, replicas: int = 3) -> bool:
        """Whether ``name`` trains again, one of ``replicas``, and has landed an average."""
        return any(
            line["time"] > since and line["params"] >= 1 and line["replicas"] == replicas
            for line in self.trained(name)[-1:]
        )

    def doom(self, name: str) -> None:
        """``name`` will die inside its next average of several states."""
        (self.folder / f"{name}.doom").touch()

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.ranks > 1:
                self.reap()
            if time.monotonic() > deadline:
                said = {path.name: path.read_text()[-1500:] for path in self.folder.glob("*.err")}
                raise AssertionError(f"waited {seconds} s; {said}")
            time.sleep(0.03)

    def finish(self) -> dict[str, Any]:
        """Lets every replica train to one clock and returns what each ends with."""
        stop = max(map(self.clock, self.processes)) // LONGEST * LONGEST + 6 * LONGEST
        (self.folder / "stop.new").write_text(str(stop))
        (self.folder / "stop.new").rename(self.folder / "stop")
        self.wait(lambda: not any(process.is_alive() for process in self.processes.values()))
        return {name: self.lines(name)[-1].get("done") for name in self.processes}

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join(timeout=10)
        self.lighthouse.shutdown()
