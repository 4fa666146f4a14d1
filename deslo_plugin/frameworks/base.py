"""The seam of frameworks: what one of them must answer, and the attachment that is built of its answers.

``plain``, ``ddp``, ``fsdp2``, ``torchft`` and ``deepspeed`` answer; nothing else asks how a model is wrapped."""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.attachment import Attachment
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checkpoint.state_tree import StateAdapter
from deslo_plugin.checks.replica_checks import agree_on_optimizer, say_placement
from deslo_plugin.checks.replica_watch import Watch
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.comm.transport import Transport
from deslo_plugin.config.schema import Config
from deslo_plugin.frameworks.rehearsal import refuse_empty_fragments, rehearse
from deslo_plugin.frameworks.telemetry_sinks import start_telemetry
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.any_optimizer_step import schedule
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.planning.route import Route
from deslo_plugin.planning.wire_cost import BYTES


class Framework(Protocol):
    """One optimizer, and the model that it steps, where a framework keeps them. ``build_attachment`` asks from top to
    bottom; the rest holds once ``groups`` was called."""

    optimizer: torch.optim.Optimizer
    config: Config
    state_adapter: Callable[[Any, Sequence[Attachment]], StateAdapter]
    engine_steps: bool = False  # whether an engine takes the steps, and not ``optimizer.step()`` alone
    live: bool = False  # whether replicas come and go
    first: bool = True  # whether nothing else is attached to the model
    alike: Collection[str] = ()  # those of ``named`` that the ranks of a replica must hold alike
    holders: Mapping[str, int] = MappingProxyType({})  # as an ``Attachment`` has them
    param_groups: Sequence[dict[str, Any]]  # with the tensors that the optimizer steps on this rank
    buffers: Tensors = ()  # of the model, that average

    @property
    def named(self) -> Mapping[str, Tensor]:
        """Every parameter that may train, by what messages call it."""

    @property
    def fixed_numels(self) -> Sequence[int] | None:
        """Of ``param_groups``, where the optimizer's own do not show them."""
        return None

    def groups(self) -> Groups:
        """The process groups of replicas, which are equal from now on; where replicas come and go those of this one
        alone. Collective over all ranks. Raises ``ConfigError`` on every rank for what cannot be kept inside a
        replica."""

    def transport(self, groups: Groups) -> tuple[Transport, Route | None]:
        """What carries averages, and which way. Collective."""

    def average_buffers(self, averaging: StateAverager, groups: Groups) -> None:
        """Lets ``buffers`` follow the averages of parameters."""
        return None

    def keep_gradients_inside(self, averaging: StateAverager, groups: Groups) -> None:
        """From now on gradients stay inside a replica, but for the synchronous warm-up."""

    def gradient_bytes(self, divisor: int) -> list[int] | None:
        """What a step of the warm-up sends of each param group; None if it is what an average of a state sends."""
        return None

    def install(self, attachment: Attachment) -> None:
        """Registers ``attachment``, and whatever steps or saves by it."""


def build_attachment(framework: Framework, on_average: Callable[[SyncEvent], object] | None = None) -> Attachment:
    """Connects the optimizer of ``framework`` to its replicas: the one way in which an attachment comes into being.
    Collective over all ranks."""
    config, groups = framework.config, framework.groups()
    world = groups.world
    transport, route = framework.transport(groups)
    own = [param for group in framework.param_groups for param in local(group["params"])]
    refuse_empty_fragments(config.deslo.fragments, own, world)
    averaging = _averaging_of(framework, transport, world, on_average)
    if world is not None:
        agree_on_optimizer(averaging, config, world, groups.topology.ranks_by_shard if framework.holders else None)
    framework.average_buffers(averaging, groups)
    framework.keep_gradients_inside(averaging, groups)
    attachment = Attachment(
        averaging,
        groups,
        config,
        framework.state_adapter,
        fixed_numels=framework.fixed_numels,
        gradient_bytes=framework.gradient_bytes(transport.divisor),
        buffer_bytes=sum(buffer.numel() for buffer in framework.buffers) * BYTES[config.deslo.wire.plain],
        engine_steps=framework.engine_steps,
        watch=None if framework.live else _watch_of(framework, averaging, groups),
        route=route,
        holders=framework.holders,
        live=framework.live,
    )
    framework.install(attachment)
    if not framework.live:  # else the plan is known once a quorum has met
        if world is not None:
            rehearse(attachment, own)
        attachment.announce()
        if world is not None:
            say_placement(groups.topology, world)
    start_telemetry(attachment)
    return attachment


def _averaging_of(framework: Framework, transport: Transport, world: Any, on_average: Any) -> StateAverager:
    optimizer, groups = framework.optimizer, framework.param_groups
    if isinstance(optimizer, DesLoc):
        optimizer.attach(transport, [param for group in groups for param in group["params"]], on_average)
        return optimizer.averaging
    averaging = AnyOptimizerAverager(
        optimizer,
        framework.config.deslo,
        transport,
        groups=groups if framework.engine_steps else None,
        everyone=lambda value: [value] if world is None else list(all_gather_by_rank(value, world).values()),
        on_average=on_average,
    )
    if not framework.engine_steps:
        schedule(averaging)
    return averaging


def _watch_of(framework: Framework, averaging: StateAverager, groups: Groups) -> Watch:
    return Watch(
        averaging,
        groups,
        framework.named,
        framework.alike,
        names_left_out=framework.first,
        in_engine=framework.engine_steps,
    )
