"""Streaming: a state in fragments that are averaged at steps of their own, the same bytes without bursts (arXiv
2501.18512).

Fragment i of P of a state with period K is due once t steps are complete where

    (t - offset) mod K = 0,    offset = (phase + floor(i K / P)) mod K

One fragment is the papers' schedule: every offset is 0. With more, a state's fragments are spread evenly over its
period, and phases are chosen so that the fragments of all states together come as evenly as they can."""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain, pairwise
from math import lcm

from deslo_plugin.algorithm.schedule import Periods

WINDOW = 10_000  # steps that phases are chosen by, where periods have no shorter common multiple

Due = Mapping[int, tuple[str, ...]]
"""Fragment -> the states of which it is to be averaged now."""


def due_fragments(periods: Periods, count: int, steps: int) -> Due:
    """What to average once ``steps`` steps are complete, of states in ``count`` fragments. In the order of fragments,
    and of ``periods`` in each."""
    if steps <= 0:
        return {}
    due: dict[int, tuple[str, ...]] = {}
    for state, starts in offsets(tuple(periods.items()), count).items():
        for fragment, offset in enumerate(starts):
            if (period := periods[state]) and (steps - offset) % period == 0:
                due[fragment] = (*due.get(fragment, ()), state)
    return dict(sorted(due.items()))


@lru_cache(maxsize=256)
def offsets(periods: tuple[tuple[str, int | None], ...], count: int) -> dict[str, tuple[int, ...]]:
    """State -> the offset of each of its fragments, in steps; of the states that are averaged. Those of one period have
    the same: a momentum and the second moment that it is divided by still meet together."""
    averaged = {state: period for state, period in periods if period}
    if count == 1:
        return dict.fromkeys(averaged, (0,))
    window = min(lcm(*averaged.values()), WINDOW)
    load, found = [0] * window, {}
    for period, states in sorted(Counter(averaged.values()).items()):  # the most frequent first
        choices = (_spread(period, count, phase) for phase in range(-(-period // count)))
        found[period] = min(choices, key=lambda starts: _crowding(load, starts, period))
        for step in _steps(found[period], period, window):
            load[step] += states
    return {state: found[period] for state, period in averaged.items()}


def sizes(numel: int, count: int) -> list[int]:
    """The elements of each fragment of a flat tensor of ``numel``."""
    ends = [-(-index * numel // count) for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


def _spread(period: int, count: int, phase: int) -> tuple[int, ...]:
    return tuple((phase + fragment * period // count) % period for fragment in range(count))


def _steps(starts: tuple[int, ...], period: int, window: int) -> Iterator[int]:
    return chain.from_iterable(range(start, window, period) for start in starts)


def _crowding(load: list[int], starts: tuple[int, ...], period: int) -> tuple[int, int]:
    """(the most that these meet with at once, all that they meet with)."""
    met = [load[step] for step in _steps(starts, period, len(load))]
    return max(met), sum(met)
