"""The switch of a config, made in the states of an optimizer when its step comes (``algorithm.switch``)."""

from collections.abc import Callable, Sequence

import torch

from deslo_plugin.algorithm.switch import Switch
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.state_averager import StateAverager


class Switching:
    """Makes it in what ``averaging`` averages. ``listeners`` are told once, however many calls make up a step."""

    def __init__(self, averaging: StateAverager):
        self._averaging = averaging
        self.listeners: list[Callable[[Switch], object]] = []
        self._told: int | None = None  # at which of the steps taken

    def make(self, switch: Switch | None, cohorts: Sequence[Cohort]) -> None:
        """Sets momenta of those ``cohorts`` to 0 whose next step is the first after ``switch``, and whatever of them is
        still under way lands as nothing. What landed at the start of this step is gone with them."""
        beginning = [cohort for cohort in cohorts if switch is not None and cohort.steps == switch.at]
        if switch is None or not beginning:
            return
        for cohort in beginning:
            for state in switch.reset:
                torch._foreach_zero_(self._averaging.part(cohort, state))
            self._averaging.flights.decay(cohort.params, dict.fromkeys(switch.reset, 0.0))
        if self._told != self._averaging.stats.steps:
            self._told = self._averaging.stats.steps
            for listener in self.listeners:
                listener(switch)
