"""What an optimizer that is connected to its replicas can be asked: ``attach(...)`` returns it, ``engine.deslo`` is it."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from deslo_plugin.averaging import Averaging
from deslo_plugin.collectives import Groups
from deslo_plugin.config import Config
from deslo_plugin.plan import Plan, make_plan
from deslo_plugin.stock import NUMELS
from deslo_plugin.telemetry import Meter
from deslo_plugin.topology import Topology


@dataclass(frozen=True)
class Attachment:
    """The averages of one optimizer: what moves, between whom, and what it has cost.

    ``groups`` is None where replicas come and go. ``numels`` and ``gradient_bytes`` are per param group, on this rank; ``buffer_bytes`` is what buffers send.
    """

    averaging: Averaging
    groups: Groups | None
    config: Config
    numels: Sequence[int]
    gradient_bytes: Sequence[int] | None = None
    buffer_bytes: int = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.averaging.optimizer

    @property
    def topology(self) -> Topology:
        return self.groups.topology

    @property
    def steps(self) -> int:
        """Optimizer steps completed, those before a resume or of the replica that a latecomer took over included."""
        return self.averaging.steps

    @property
    def meter(self) -> Meter:
        return self.averaging.meter

    @property
    def plan(self) -> Plan:
        """By the periods as they are now: those of a stock optimizer's states are known after its first step."""
        return make_plan(
            self.config, self.numels, [group["sync_every"] for group in self.averaging.groups], self.topology,
            divisor=self.averaging.average.divisor, gradient_bytes=self.gradient_bytes, buffer_bytes=self.buffer_bytes,
            others=[group.get(NUMELS, {}) for group in self.averaging.groups],
        )


attached: MutableMapping[torch.nn.Module, Attachment] = WeakKeyDictionary()
"""By model: kept beside it, so that models can still be copied and pickled."""
