"""What an optimizer that is connected to its replicas can be asked; ``attach(...)`` and ``engine.deslo`` give it."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, wraps
from inspect import signature
from itertools import chain
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup

from deslo_plugin.algorithm.schedule import Periods
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.metrics import Meter
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checks.module_wrappers import bare
from deslo_plugin.checks.replica_watch import Watch
from deslo_plugin.comm.process_groups import Groups
from deslo_plugin.comm.topology import Topology, contiguous
from deslo_plugin.comm.transport import LiveTransport
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.availability import kernels_on, settle
from deslo_plugin.log import announce, log_rank0
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.planning.plan import Plan, make_plan
from deslo_plugin.planning.route import Route
from deslo_plugin.renamed import Renamed
from deslo_plugin.telemetry.recorder import Recorder


@dataclass(frozen=True)
class Attachment:
    """The averages of one optimizer: what moves, between whom, and what it has cost.

    ``groups`` are all replicas, or where these come and go (``live``) the ranks of this one.
    ``state_adapter(model, attachments)`` gives the framework's ``checkpoint.state_tree.StateAdapter``.
    ``gradient_bytes`` are per param group, on this rank; ``buffer_bytes`` is what buffers send. ``engine_steps``: a
    framework's engine takes the steps, not the optimizer alone; ``fixed_numels`` are the ``numels`` where its param
    groups do not show them. ``route`` is the way of averages. ``holders``: parameter -> how many ranks of a replica
    hold it, where they hold different ones; else nothing."""

    averaging: StateAverager
    groups: Groups
    config: Config
    state_adapter: Callable[[Any, Sequence["Attachment"]], Any]
    fixed_numels: Sequence[int] | None = None
    gradient_bytes: Sequence[int] | None = None
    buffer_bytes: int = 0
    engine_steps: bool = False
    watch: Watch | None = None
    route: Route | None = None
    holders: Mapping[str, int] = field(default_factory=dict)
    live: bool = False

    @property
    def peers(self) -> ProcessGroup | None:
        """Over which a whole tensor has its mean: all ranks, or those that hold the same part of a model."""
        return self.groups.replica if self.holders else self.groups.world

    @property
    def numels(self) -> Sequence[int]:
        """Elements of each param group that average, on this rank."""
        return self.fixed_numels or [self.averaging.members.numel(group) for group in self.averaging.groups]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.averaging.optimizer

    @property
    def topology(self) -> Topology:
        """Where replicas come and go, that of the last quorum."""
        own = self.groups.topology
        if not self.live:
            return own
        live = cast(LiveTransport, self.averaging.transport)
        return contiguous(live.replicas * own.replica_size, live.rank * own.replica_size + own.shard, own.replica_size)

    @property
    def steps(self) -> int:
        """Optimizer steps completed, those before a resume or of the replica that a latecomer took over included."""
        return self.averaging.steps

    @property
    def stats(self) -> Meter:
        return self.averaging.stats

    end, meter, saw = Renamed("close"), Renamed("stats"), Renamed("record_samples")

    def together(self, call: str) -> AbstractContextManager[None]:
        """The body is ``call``, which every rank must make; see ``Progress.together``."""
        progress = self.averaging.transport.progress
        return progress.together(call, self.config.deslo.timeout_s) if progress else nullcontext()

    @cached_property
    def recorder(self) -> Recorder:
        """What is written down and passed on of this attachment; nothing without ``deslo.telemetry`` and trackers."""
        return Recorder(self.averaging)

    def log(self, **values: Any) -> None:
        """Writes numbers of this rank beside its averages, for ``deslo report``: call it once a step, on every rank.

        ``loss``: of this rank's batch, ``tokens``: in it, are what the report draws; other names are kept. A tensor is
        read when it is there: no GPU is waited for. Does nothing without ``deslo.telemetry``, and on ranks that write
        no file. Raises ``ConfigError`` for what is no number.
        """
        self.recorder.log(values)

    def summary(self) -> str:
        """What averaging has moved, cost and found since this process attached, a line for each state."""
        return self.recorder.summary(self.plan)

    def close(self) -> None:
        """Writes what telemetry has not written yet, and says the summary. The end of the process does that too, but
        not that of ``os._exit`` or a kill, which lose the last second. Does nothing without ``deslo.telemetry``."""
        if self.config.deslo.telemetry is not None and not self.recorder.ended:
            self.recorder.end(self.plan)
            log_rank0(self.summary())

    def announce(self) -> None:
        """Says the plan and what kernels run, and the plan again after the first step if a stock optimizer turned out
        to have other states; begins to watch."""
        params, said = [p for group in self.optimizer.param_groups for p in group["params"]], self.plan.describe()
        settle(params)
        announce(f"{said}\n  kernels: {kernels_on(params)}")
        if isinstance(self.optimizer, DesLoc):
            self.optimizer.on_switch.append(lambda switch: announce(f"deslo: the update switches {switch}"))
        if self.watch is not None:
            self.watch.on_first_step = lambda: self._announce_change(said)
            self.watch.begin()

    def _announce_change(self, said: str) -> None:
        if (plan := self.plan.describe()) != said:
            announce(plan)

    def check(self) -> list[str]:
        """What is wrong with this attachment, as sentences that are the same on every rank, each said once; empty if
        all is well.

        Whether parameters moved without a step of the attached optimizer, replicas and the ranks of each are equal
        where they must be, and every trained parameter is in an attached optimizer; and what the first averages have
        shown, which are looked at without a call. Collective over all ranks. Raises ``ConfigError`` where replicas come
        and go."""
        if self.watch is None:
            raise ConfigError(
                "check()", "replicas that are there from start to end", "those of a torchft manager", "remove it"
            )
        return self.watch.check()

    def record_samples(self, samples: float) -> None:
        """Tells the samples (or tokens, counted alike on every rank) in the gradients of this rank's next step, for
        ``deslo.replica_weights: "samples"``; calls add up, as over micro-batches."""
        self.averaging.samples.record_samples(samples)

    @torch.no_grad()
    def skip_step(self) -> None:
        """In place of ``optimizer.step()``: this replica leaves a step out that others may take, and averages with
        them.

        On every rank of the replica. Raises ``ConfigError`` under DeepSpeed, whose engine counts its steps itself.
        """
        if self.engine_steps:
            raise ConfigError(
                "skip_step()",
                "engine.step() at every step under DeepSpeed",
                "a step left out",
                'take smaller batches on a slow replica, with deslo.replica_weights "samples"',
            )
        steps: Any = self.averaging if isinstance(self.averaging, AnyOptimizerAverager) else self.optimizer  # a DesLoc
        steps.skip_step()

    def step_rates(self) -> dict[int, float]:
        """Replica -> steps per second between its last two averages, without what it waited for others; any rank may
        ask.

        A replica that has not come to two averages yet is absent. Raises ``TimeoutError`` if the world's store is gone.
        """
        progress = self.averaging.transport.progress
        return progress.rates() if progress else {}

    @property
    def periods(self) -> list[Periods]:
        """Of each param group, state -> the period in force: those that adapt change at averages, the same on every
        rank."""
        return [dict(self.averaging.periods(group)) for group in self.averaging.groups]

    @property
    def plan(self) -> Plan:
        """By the periods as they are configured. Which states a stock optimizer has is known after its first step:
        until then all that ``deslo.sync_every`` names, each as large as its parameter."""
        known = getattr(self.averaging, "periods_known", True)
        periods = [group["sync_every"] if known else self.config.schedule for group in self.averaging.groups]
        return make_plan(
            self.config,
            self.numels,
            periods,
            self.topology,
            divisor=self.averaging.transport.divisor,
            gradient_bytes=self._gradient_bytes,
            buffer_bytes=self.buffer_bytes,
            others=[
                self.averaging.state_numels(group) if isinstance(self.averaging, AnyOptimizerAverager) else {}
                for group in self.averaging.groups
            ],
            cuts=self._cuts,
            route=self.route,
        )

    @property
    def _cuts(self) -> list[list[list[int]]] | None:
        """Of each param group and fragment the elements of its parts on this rank, where its groups show them."""
        members, fragments, deslo = self.averaging.members, self.averaging.fragments, self.config.deslo
        if self.fixed_numels or (deslo.fragments == 1 and not deslo.wire.quantizes):
            return None
        return [fragments.numels(Cohort(0, group, members.of(group), {})) for group in self.averaging.groups]

    @property
    def _gradient_bytes(self) -> list[int] | None:
        """The warm-up averages the gradients of the parameters that were there when it began."""
        if self.gradient_bytes is None:
            return None
        return [*self.gradient_bytes, *(0 for _ in self.averaging.groups[len(self.gradient_bytes) :])]


OF_ONE_REPLICA = ("save", "load", "averaged_state_dict")  # calls that a replica which comes and goes makes by itself

_by_model: MutableMapping[torch.nn.Module, list[Attachment]] = WeakKeyDictionary()
"""By the model inside all wrappers, one for each optimizer that steps it: beside it, so that it can still be copied."""


def register(attachment: Attachment, owner: Any, model: torch.nn.Module | None = None) -> None:
    """``attachment`` is found from now on by its ``owner``, an optimizer or an engine, and by the ``model`` inside all
    wrappers."""
    owner.deslo = attachment
    if model is not None:
        _by_model.setdefault(model, []).append(attachment)


def all_of_models() -> Iterator[Attachment]:
    """Every attachment of every model in this process."""
    return chain.from_iterable(_by_model.values())


def attached_to(target: Any) -> list[Attachment]:
    """The attachments of a model, whatever is wrapped around it, of an optimizer or of an engine; nothing if there are
    none."""
    inside = bare(target) if isinstance(target, torch.nn.Module) else None
    if inside is not None and inside in _by_model:
        return _by_model[inside]
    own = getattr(target, "deslo", None)
    return [own] if isinstance(own, Attachment) else []


def attachment_of(target: Any) -> Attachment | None:
    """The first of ``attached_to``."""
    return next(iter(attached_to(target)), None)


def model_of(attachment: Attachment) -> torch.nn.Module:
    """The model inside all wrappers that ``attachment`` was registered with."""
    return next(model for model, attachments in _by_model.items() if attachment in attachments)


def attachments_of(model: Any, what: str) -> list[Attachment]:
    """``attached_to``, for a call ``what`` of all ranks. Raises ``ConfigError`` if nothing is attached, and for
    most calls where replicas come and go, of which none can ask the others at will."""
    found = attached_to(model)
    if not found:
        raise ConfigError(
            what,
            "a DeepSpeed engine with a deslo block, or a model that attach was called with",
            type(model).__name__,
            "call deslo_plugin.attach(model, optimizer) first",
        )
    if what not in OF_ONE_REPLICA and any(attachment.live for attachment in found):
        raise ConfigError(
            what,
            "replicas that are there from start to end",
            "those of a torchft manager",
            "use one of " + ", ".join(OF_ONE_REPLICA) + ", which ask no other replica; latecomers need no file",
        )
    return found


def on_every_rank(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which has a parameter ``model``, as a call that begins once all ranks have come to it; see
    ``together``."""
    parameters = signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        model = parameters.bind(*args, **kwargs).arguments["model"]
        with attachments_of(model, function.__name__)[0].together(f"{function.__name__}()"):
            return function(*args, **kwargs)

    return call
