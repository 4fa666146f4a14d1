"""What a config can say, as frozen dataclasses: the one place of the defaults of ``deslo``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from deslo_plugin.algorithm.adaptive_periods import Schedule
from deslo_plugin.algorithm.momentum_bound import Bound
from deslo_plugin.algorithm.orthogonal import Orthogonal
from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.algorithm.schedule import Periods
from deslo_plugin.algorithm.state_names import PARAMS, SECOND_MOMENT, first_momenta
from deslo_plugin.algorithm.switch import Switch
from deslo_plugin.config.telemetry import Telemetry
from deslo_plugin.config.wire import Wire
from deslo_plugin.errors import require

AVERAGE_AT = ("before_step", "after_step")
CHECKPOINT_MODES = ("averaged", "per_replica", "synchronized")
REPLICA_WEIGHTS = ("uniform", "samples")
INITIAL_PARAMS = ("auto", "broadcast", "check")
STATE_DICTS = ("refuse", "averaged", "last_average")
DIGESTS = ("crc32", "sha256")
TRANSPORTS = ("device", "host", "auto")
STATE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Nesterov step on the averaged parameters: DiLoCo, DES-LOC-Nesterov. ``lr`` None: by the number of replicas."""

    lr: float | None
    momentum: float

    def rate(self, replicas: int) -> float:
        """``lr``, or what DiLoCo's scaling law found best with momentum 0.9 and 30 steps between averages (arXiv
        2503.09799)."""
        if self.lr is not None:
            return self.lr
        return 0.5 if replicas == 1 else 0.6 if replicas < 8 else 0.8

    def describe(self, replicas: int) -> str:
        why = "" if self.lr is not None else f", by the number of replicas, {replicas}"
        return f"lr {self.rate(replicas):g}{why}; momentum {self.momentum:g}"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What is computed: ``optimizer.params``.

    ``betas`` and ``weights`` have one entry per first momentum; ``beta2`` and ``eps`` are None for sgdm.
    ``state_dtype`` is the dtype of the momenta; float64 parameters have float64 momenta and take no other.
    ``periods`` and ``period_sources`` (why each period is what it is) run over the averaged states. ``switch`` is what
    changes at one step; ``lr_factor`` multiplies the rate that a param group has, 1 before the switch.

    A rule of matrices has ``orthogonal``, how it makes directions orthogonal, and ``beside``, what is computed of all
    other parameters.
    """

    rule: str
    lr: float
    betas: tuple[float, ...]
    weights: tuple[float, ...]
    beta2: float | None
    eps: float | None
    weight_decay: float
    bias_correction: bool
    clip_value: float | None
    periods: Schedule
    period_sources: Mapping[str, str]
    reset_momenta: bool
    outer_optimizer: Outer | None
    state_dtype: str
    switch: Switch | None = None
    lr_factor: float = 1.0
    orthogonal: Orthogonal | None = None
    beside: "OptimizerConfig | None" = None

    @cached_property
    def by_rule(self) -> "Mapping[str, OptimizerConfig]":
        """Rule -> what is computed of the parameters that have it."""
        return {self.rule: self, **({} if self.beside is None else self.beside.by_rule)}

    def at(self, steps: int) -> "OptimizerConfig":
        """What the update computes that ``steps`` completed steps come before."""
        return self if self.switch is None or steps < self.switch.at else self.after_switch

    @cached_property
    def after_switch(self) -> "OptimizerConfig":
        """What the updates from the switch on compute; without one, what all do."""
        switch = self.switch
        if switch is None:
            return self
        numbers: dict[str, Any] = {"betas": switch.betas, "weights": switch.weights, "lr_factor": switch.lr_factor}
        return replace(self, **numbers, switch=None, beside=self.beside and self.beside.after_switch)

    @property
    def momenta(self) -> tuple[str, ...]:
        """State names of the first momenta."""
        return first_momenta(len(self.betas))

    @property
    def moments(self) -> tuple[str, ...]:
        """State names of all momenta, first and second."""
        return tuple(state for state in self.periods if state != PARAMS)

    @property
    def moments_of_all(self) -> tuple[str, ...]:
        """Those of each rule."""
        return tuple(dict.fromkeys(moment for each in self.by_rule.values() for moment in each.moments))

    @property
    def beta_of(self) -> dict[str, float]:
        """State name -> beta of that momentum."""
        return dict(zip(self.momenta, self.betas)) | ({} if self.beta2 is None else {SECOND_MOMENT: self.beta2})

    @property
    def constants(self) -> dict[str, Any]:
        """What the operator of the rule takes beside tensors, rate and decay."""
        rule = RULES[self.rule]
        constants: dict[str, Any] = {"betas": self.betas, "weights": self.weights, "clip_value": self.clip_value}
        constants |= {"beta2": self.beta2, "eps": self.eps} if rule.has_second_moment else {}
        constants |= {"orthogonal": self.orthogonal} if rule.of_matrices else {}
        return constants | ({"bias_correction": self.bias_correction} if rule.corrects_bias else {})

    def bounds(self, steps: int) -> list[Bound]:
        """What the second moment allows each momentum after ``steps`` updates; adopt divides by it before it averages,
        sgdm has none. A momentum that went through the switch as it was keeps the wider bound of the two."""
        if not RULES[self.rule].bounds_momenta:
            return []
        now, went_on = self.at(steps - 1), dict(zip(self.momenta, self.betas))
        if self.switch is not None:
            went_on = {state: beta for state, beta in went_on.items() if state not in self.switch.reset}
        of = lambda state, beta: Bound(state, SECOND_MOMENT, beta, require(self.beta2))
        found = [(of(state, beta), of(state, went_on.get(state, beta))) for state, beta in zip(now.momenta, now.betas)]
        return [max(pair, key=lambda bound: bound.at(steps)) for pair in found]


@dataclass(frozen=True, kw_only=True)
class DesloConfig:
    """Who averages and how: ``deslo``. ``replica_size`` is in ranks, ``bucket_cap_mb`` in MiB, ``timeout_s`` in
    seconds.

    ``sync_every`` schedules the states of a stock optimizer; DesLoc has its own in ``optimizer.params``. ``sync_delay``
    is the number of forwards and backwards that an average travels under, ``fragments`` in how many parts each state is
    averaged, at steps of their own ("auto" is what ``load_config`` turns into a number); ``wire`` is what states travel
    as. ``replica_weights`` is what a replica counts in an average: as much as any other, or what it has seen;
    ``checkpoint_mode`` is what ``save`` saves, ``checkpoint_digest`` what proves its files; ``state_dict`` is what
    ``state_dict()`` of the model does while replicas differ; ``telemetry`` is what is written down, if anything.
    ``initial_params`` is what becomes of replicas that start unequal: "auto" makes them equal to replica 0 and says
    what differed, "broadcast" does so without a word, "check" is an error. ``transport`` is the way averages take: from
    device to device, or through host memory."""

    replica_size: int | Literal["auto"] = "auto"
    synchronous_steps: int = 0
    sync_every: Periods | None = None
    average_at: str = "before_step"
    overlap_comm: bool = True
    sync_delay: int = 1
    fragments: int = 1
    wire: Wire = Wire()
    bucket_cap_mb: int = 64
    initial_params: str = "auto"
    on_nonfinite: str = "stop"
    timeout_s: float = 600.0
    checkpoint_mode: str = "averaged"
    state_dict: str = "refuse"
    checkpoint_digest: str = "crc32"
    replica_weights: str = "uniform"
    transport: str = "device"
    telemetry: Telemetry | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """Both blocks; ``optimizer`` is None for a stock optimizer, which the script or DeepSpeed builds."""

    optimizer: OptimizerConfig | None
    deslo: DesloConfig

    @property
    def desloc(self) -> OptimizerConfig:
        """``optimizer`` of a config that is known to be DesLoc's."""
        return require(self.optimizer)

    @property
    def switch(self) -> Switch | None:
        return None if self.optimizer is None else self.optimizer.switch

    @property
    def schedule(self) -> Schedule:
        """State -> period, of a DesLoc or of a stock optimizer."""
        return require(self.deslo.sync_every) if self.optimizer is None else self.optimizer.periods
