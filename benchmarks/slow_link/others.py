"""How much of the machine somebody else uses: a lap next to a compiler measures the compiler."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

QUIET = 0.05  # of all cores
TICK = os.sysconf("SC_CLK_TCK")


class Others:
    """CPU time of processes that are neither this one nor among ``pids``, and patience to wait for its end."""

    def __init__(self, pids: Iterable[int], patience_s: float):
        self.pids, self.patience_s = (os.getpid(), *pids), patience_s
        self._then = self._now()

    def share(self) -> float:
        """Of all cores, since the last call."""
        then, self._then = self._then, self._now()
        seconds, busy, ours = (now - before for now, before in zip(self._then, then))
        return max(0.0, busy - ours) / TICK / (seconds * os.cpu_count())

    def wait(self) -> None:
        """Until they rest, while patience lasts. The own processes must be idle."""
        start = time.monotonic()
        busy = True
        while busy and self.patience_s > 0:
            self.share()
            time.sleep(0.5)
            busy = self.share() > QUIET
            self.patience_s -= time.monotonic() - start
            start = time.monotonic()

    def _now(self) -> tuple[float, int, int]:
        """Seconds, busy ticks of the machine, and of our processes."""
        user, nice, system, _, _, _, _, steal = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
        return time.monotonic(), user + nice + system + steal, sum(map(_ticks, self.pids))


def _ticks(pid: int) -> int:
    """User and system time of a process and of the children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15]))
