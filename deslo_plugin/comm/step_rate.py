"""How fast a replica steps, what it waits for others left out, and which replica is slower than the rest."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from statistics import median_high

from deslo_plugin.log import log_rank0

SLOWER, IN_A_ROW = 0.25, 3
SHORT_S = 0.05  # of a step: on a busy machine, what else runs there makes a quarter of less


class StepRate:
    """Steps per second of this replica between averages; ``clock`` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._waited = clock, 0.0
        self._since: tuple[int, float] | None = None  # steps, and when they were complete
        self.rate: float | None = None

    def waited(self, seconds: float) -> None:
        """These went by without a step of ours."""
        self._waited += seconds

    def reached(self, steps: int) -> None:
        """``steps`` steps are complete; said again for the same ones, it changes nothing. Fewer than before are a new
        start."""
        before, start = self._since or (steps, 0.0)
        if steps == before and self._since:
            return
        now = self._clock()
        busy = now - start - self._waited
        self.rate = (steps - before) / busy if steps > before and busy > 0 else None
        self._since, self._waited = (steps, now), 0.0


class Stragglers:
    """Says once of a replica whose steps take 50 ms or more that it is slower than the median of all by more than a
    quarter, three averages in a row."""

    def __init__(self) -> None:
        self._in_a_row: Counter[int] = Counter()

    def look(self, rates: Mapping[int, float]) -> None:
        """``rates``: replica -> steps per second at the latest average."""
        middle = median_high(rates.values()) if rates else 0.0
        for replica, rate in rates.items():
            self._in_a_row[replica] = (
                self._in_a_row[replica] + 1 if rate < min((1 - SLOWER) * middle, 1 / SHORT_S) else 0
            )
            if self._in_a_row[replica] == IN_A_ROW:
                log_rank0(
                    f"deslo: replica {replica} is slow: {rate:.3g} steps/s at {IN_A_ROW} averages in a row, where "
                    f"the median of {len(rates)} replicas is now {middle:.3g}; the others wait for it",
                    logging.WARNING,
                )
