"""What an optimizer that is connected to its replicas can be asked: ``attach(...)`` returns it, ``engine.deslo`` is it."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch

from deslo_plugin.averaging import Averaging
from deslo_plugin.collectives import Groups
from deslo_plugin.config import Config
from deslo_plugin.log import say
from deslo_plugin.plan import Plan, make_plan
from deslo_plugin.recorder import Recorder
from deslo_plugin.schedule import Periods
from deslo_plugin.stock import StockAveraging
from deslo_plugin.strict import ConfigError
from deslo_plugin.telemetry import Meter
from deslo_plugin.topology import Topology


@dataclass(frozen=True)
class Attachment:
    """The averages of one optimizer: what moves, between whom, and what it has cost.

    ``groups`` is None where replicas come and go. ``gradient_bytes`` are per param group, on this rank; ``buffer_bytes`` is what
    buffers send. ``engine_steps``: a framework's engine takes the steps, not the optimizer alone; ``numels`` then are the
    elements of each param group on this rank.
    """

    averaging: Averaging
    groups: Groups | None
    config: Config
    numels: Sequence[int] | None = None
    gradient_bytes: Sequence[int] | None = None
    buffer_bytes: int = 0
    engine_steps: bool = False

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

    @cached_property
    def recorder(self) -> Recorder:
        """What is written down and passed on of this attachment; nothing without ``deslo.telemetry`` and trackers."""
        return Recorder(self.averaging)

    def log(self, **values: Any) -> None:
        """Writes numbers of this rank beside its averages, for ``deslo report``: call it once a step, on every rank.

        ``loss``: of this rank's batch, ``tokens``: in it, are what the report draws; other names are kept. A tensor is read
        when it is there: no GPU is waited for. Does nothing without ``deslo.telemetry``, and on ranks that write no file.
        Raises ``ConfigError`` for what is no number.
        """
        self.recorder.log(values)

    def summary(self) -> str:
        """What averaging has moved, cost and found since this process attached, a line for each state."""
        return self.recorder.summary(self.plan)

    def end(self) -> None:
        """Writes what telemetry has not written yet, and says the summary. The end of the process does that too, but not that
        of ``os._exit`` or a kill, which lose the last second. Does nothing without ``deslo.telemetry``."""
        if self.config.deslo.telemetry is not None and not self.recorder.ended:
            self.recorder.end(self.plan)
            say(self.summary())

    def saw(self, samples: float) -> None:
        """Tells the samples (or tokens, counted alike on every rank) in the gradients of this rank's next step, for
        ``deslo.weights: "samples"``; calls add up, as over micro-batches."""
        self.averaging.saw(samples)

    @torch.no_grad()
    def skip_step(self) -> None:
        """In place of ``optimizer.step()``: this replica leaves a step out that others may take, and averages with them.

        On every rank of the replica. Raises ``ConfigError`` under DeepSpeed, whose engine counts its steps itself.
        """
        if self.engine_steps:
            raise ConfigError("skip_step()", "engine.step() at every step under DeepSpeed", "a step left out",
                              'take smaller batches on a slow replica, with deslo.weights "samples"')
        (self.averaging if isinstance(self.averaging, StockAveraging) else self.optimizer).skip_step()

    def step_rates(self) -> dict[int, float]:
        """Replica -> steps per second between its last two averages, without what it waited for others; any rank may ask.

        A replica that has not come to two averages yet is absent. Raises ``TimeoutError`` if the world's store is gone.
        """
        progress = self.averaging.average.progress
        return progress.rates() if progress else {}

    @property
    def periods(self) -> list[Periods]:
        """Of each param group, state -> the period in force: those that adapt change at averages, the same on every rank."""
        return [dict(self.averaging.periods(group)) for group in self.averaging.groups]

    @property
    def plan(self) -> Plan:
        """By the periods as they are configured: those of a stock optimizer's states are known after its first step."""
        return make_plan(
            self.config, self.numels or [self.averaging.members.numel(group) for group in self.averaging.groups],
            [group["sync_every"] for group in self.averaging.groups], self.topology,
            divisor=self.averaging.average.divisor, gradient_bytes=self.gradient_bytes, buffer_bytes=self.buffer_bytes,
            others=[self.averaging.state_numels(group) if isinstance(self.averaging, StockAveraging) else {}
                    for group in self.averaging.groups],
        )


attached: MutableMapping[torch.nn.Module, list[Attachment]] = WeakKeyDictionary()
"""By model, one for each optimizer that steps it: kept beside it, so that models can still be copied and pickled."""


def attachments_of(model: Any, what: str) -> list[Attachment]:
    """Of a model that ``attach`` was called with, or a DeepSpeed engine. Raises ``ConfigError`` for anything else, and for
    replicas that come and go, of which no rank can ask the others at will."""
    if isinstance(model, torch.nn.Module) and model in attached:
        if any(attachment.groups is None for attachment in attached[model]):
            raise ConfigError(what, "replicas that are there from start to end", "those of a torchft manager",
                              "keep the state dicts of model and optimizer yourself, of any replica; latecomers need no file")
        return attached[model]
    if hasattr(model, "basic_optimizer") and hasattr(model, "deslo"):
        return [model.deslo]
    raise ConfigError(what, "a DeepSpeed engine with a deslo block, or a model that attach was called with", type(model).__name__,
                      "call deslo_plugin.attach(model, optimizer) first")
