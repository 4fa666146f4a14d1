"""Contestants that take turns on one cable, rate by rate."""

import random
from collections.abc import Callable, Mapping

from benchmarks.slow_link import exposure
from benchmarks.slow_link.contestants import CONTESTANTS, FLOORS, Contestant, Setting
from benchmarks.slow_link.exposure import Lap, Row
from benchmarks.slow_link.network import Cable
from benchmarks.slow_link.others import QUIET, Others
from benchmarks.slow_link.ranks import World
from examples.harness.gpt import GPTConfig

SHAPE = GPTConfig(dim=128, layers=3, context=144)
SEQUENCES = {1: 4, 2: 1}  # ranks per node -> of each rank and step; four ranks share the machine that two have
ROUNDS = 12  # laps in a whole longest period: 6 K steps in halves of K
SOME = 4  # laps of those whose costs are large: 2 K steps, or K of those that communicate at every step
MORE = 2  # longest periods at most, of contestants that somebody else disturbed


class Race:
    """Contestants that take turns on one cable."""

    def __init__(
        self,
        contestants: Mapping[str, Contestant],
        period: int,
        cable: Cable,
        worlds: Mapping[int, World],
        advance: Callable[..., None],
        patience_s: float,
        cycles: int,
        shape: GPTConfig = SHAPE,
    ):
        self.shape = shape
        self.contestants, self.period, self.cable, self.worlds = contestants, period, cable, worlds
        self.advance, self.cycles = advance, cycles
        self.others = Others((pid for world in worlds.values() for pid in world.pids), patience_s)
        self.busy = 1.0

    def build(self) -> None:
        for name, contestant in self.contestants.items():
            self.advance("building", contestant.title)
            setting = Setting(self.shape, SEQUENCES[contestant.per_node], self.period)
            self.worlds[contestant.per_node].ask("build", name, setting, self.period // 4)

    def run(self, mbit: float | None) -> list[Row]:
        """``cycles`` longest periods of each, and more of those whom somebody else disturbed, while patience lasts."""
        self.cable.shape(mbit)
        self.laps: dict[str, list[Lap]] = {name: [] for name in self.contestants}
        unsettled, cycles = set(self.contestants), 0
        while unsettled and (cycles < self.cycles or self.others.patience_s > 0 and cycles < self.cycles + MORE):
            for index in range(ROUNDS):
                laps = {name: laps_of(self.contestants[name]) for name in unsettled}
                turn = [name for name, share in laps.items() if index * share % ROUNDS < share]
                for name in random.sample(turn, len(turn)):
                    self.advance(called(mbit), self.contestants[name].title, by=cycles < self.cycles)
                    self.laps[name].append(self._lap(name, cycles * ROUNDS + index))
            cycles += 1
            unsettled = {
                name for name in self.contestants if cycles < self.cycles or exposure.unsettled(self.laps[name])
            }
            unsettled |= {FLOORS[self.contestants[name].per_node] for name in unsettled}
        return [
            exposure.row(name, self.laps[name], self._floor(name), hides=each.hides, mbit=mbit)
            for name, each in self.contestants.items()
        ]

    def _floor(self, name: str) -> list[Lap]:
        return self.laps[FLOORS[self.contestants[name].per_node]]

    def _lap(self, name: str, index: int) -> Lap:
        contestant = self.contestants[name]
        steps = self.period // (2 if contestant.longest else 4)
        if self.busy > QUIET:  # the lap before was disturbed; while all rest nothing is waited for
            self.others.wait()
        self.others.share()
        before = self.cable.sent()
        segments = self.worlds[contestant.per_node].ask("run", name, steps)
        sent = [after - earlier for earlier, after in zip(before, self.cable.sent())]
        self.busy = self.others.share()
        return exposure.lap(index, segments, sent, self.busy)


def laps_of(contestant: Contestant) -> int:
    """Of ``ROUNDS`` rounds, in how many it takes part: a whole number of its longest periods."""
    if contestant.longest > 1 or contestant in map(CONTESTANTS.get, FLOORS.values()):
        return ROUNDS
    return ROUNDS // 2 if contestant.hides else SOME


def called(mbit: float | None) -> str:
    return "unshaped" if mbit is None else f"{mbit:g} Mbit/s"
