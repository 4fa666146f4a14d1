"""One training job under several schedules: the config's own, without overlap, synchronous, and the papers' others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

from deslo_plugin.algorithm.schedule import Periods
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.config.schema import Config
from deslo_plugin.planning.alternatives import (
    FEW_BITS,
    alternatives,
    in_few_bits,
    in_fragments,
    most_fragments,
    synchronous,
)
from deslo_plugin.planning.forecast import BACKWARD, Forecast, Link, Transfer, forecast, transfers
from deslo_plugin.planning.plan import Plan, make_plan

GRADIENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OWN, IN_TURN, IN_FRAGMENTS, IN_BITS = "this config", "its overlap off", "in fragments", f"{FEW_BITS} fragments"
SYNCHRONOUS, HIDDEN = "synchronous", "synchronous, overlapped"


@dataclass(frozen=True)
class Job:
    """``numel`` parameters on ``replicas`` of ``replica_size`` ranks, which hold equal shards; ``steps`` steps that
    compute for ``step_s`` seconds each. Synchronous training sends gradients in ``gradient_dtype``."""

    config: Config
    numel: int
    replicas: int
    replica_size: int
    step_s: float
    steps: int
    gradient_dtype: str = "float32"

    def plan(self, config: Config | None = None, periods: Periods | None = None) -> Plan:
        config = config or self.config
        shard = ceil(self.numel / self.replica_size)
        topology = contiguous(self.replicas * self.replica_size, 0, self.replica_size)
        return make_plan(
            config,
            [shard],
            [periods or config.schedule],
            topology,
            gradient_bytes=[shard * GRADIENT_BYTES[self.gradient_dtype]],
        )


@dataclass(frozen=True)
class Method:
    """A schedule for a job. ``hidden_s``: seconds of a step under which gradients travel."""

    name: str
    job: Job
    plan: Plan
    hidden_s: float = 0.0

    @cached_property
    def moved(self) -> Sequence[Transfer]:
        return transfers(self.plan, self.job.steps)

    def on(self, link: Link) -> Forecast:
        return forecast(self.plan, link, self.job.step_s, self.job.steps, moved=self.moved, hidden_s=self.hidden_s)


def methods(job: Job) -> list[Method]:
    """The config first, then itself in turn, synchronous training twice, the alternatives, and itself in fragments and
    in few bits."""
    deslo, every_step = job.config.deslo, job.plan(synchronous(job.config, job.steps))
    found = [Method(OWN, job, job.plan())]
    if deslo.overlap_comm:
        in_turn = replace(job.config, deslo=replace(deslo, overlap_comm=False, sync_delay=1))
        found.append(Method(IN_TURN, job, job.plan(in_turn)))
    found += [Method(SYNCHRONOUS, job, every_step), Method(HIDDEN, job, every_step, BACKWARD * job.step_s)]
    found += [Method(name, job, job.plan(periods=periods)) for name, periods in alternatives(job.config).items()]
    if (most := most_fragments(job.config)) > 1:
        found.append(Method(IN_FRAGMENTS, job, job.plan(in_fragments(job.config, most))))
    if (few := in_few_bits(job.config)) != job.config:
        found.append(
            Method(
                IN_BITS if most > 1 else f"in {FEW_BITS}",
                job,
                job.plan(in_fragments(few, max(most, job.config.deslo.fragments))),
            )
        )
    return found
