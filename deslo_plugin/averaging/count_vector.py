"""Counters of parameters that step together, as elements of one vector: read and advanced at once.

Each parameter's state still has a tensor of its own, without dimensions, which others may read, write and replace: what
is written is read with the vector, even by a collective, which leaves no trace in a tensor's version; a replaced one is
found by looking."""

from collections.abc import MutableMapping, Sequence
from operator import is_
from typing import Any

import torch

States = Sequence[MutableMapping[str, Any]]
FEW = 8  # counters that are as quickly read one by one


class CountVector:
    """``states[i][key]`` of all ``states``, int64 on the CPU."""

    def __init__(self, states: States, key: str):
        self._key, self._vector = key, torch.stack([state[key].cpu().to(torch.int64) for state in states])
        self._elements = [self._vector[i] for i in range(len(states))]
        for state, element in zip(states, self._elements):
            state[key] = element

    def holds(self, states: States) -> bool:
        """Whether these are the states that it was made of, with the counters that it made."""
        now = [state.get(self._key) for state in states]
        return len(now) == len(self._elements) and all(map(is_, now, self._elements))

    @property
    def values(self) -> list[int]:
        """The counters now."""
        return self._vector.tolist()

    def fill(self, value: int) -> None:
        """Sets all of them."""
        self._vector.fill_(value)


class CountVectors:
    """Those of the lists of states that were counted last, made when a list is counted a second time."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], CountVector] = {}
        self._seen: dict[tuple[str, int], int] = {}

    def read(self, states: States, key: str) -> list[int]:
        """``states[i][key]`` of all ``states``."""
        made = self._of(states, key)
        return made.values if made else [int(state[key]) for state in states]

    def fill(self, states: States, key: str, value: int) -> None:
        """Sets ``states[i][key]`` of all ``states``."""
        if made := self._of(states, key):
            made.fill(value)
        else:
            for state in states:
                state[key].fill_(value)

    def _of(self, states: States, key: str) -> CountVector | None:
        if len(states) < FEW:
            return None
        place = key, id(states[0])
        made = self._made.get(place)
        if made is not None and made.holds(states):
            return made
        again = self._seen.get(place) == len(states)
        self._seen[place] = len(states)
        if not again:
            return None
        self._made[place] = CountVector(states, key)
        return self._made[place]
