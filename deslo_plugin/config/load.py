"""The two blocks that a user writes, read strictly into frozen dataclasses.

``optimizer.params`` says what is computed (rule, momenta, periods), ``deslo`` says who averages and how. The same two
blocks stand in a DeepSpeed JSON, in a JSON or YAML file of their own, or in a dict.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from deslo_plugin.algorithm.adaptive_periods import Schedule, adaptive, longest, shortest
from deslo_plugin.algorithm.schedule import Periods
from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.config.file import read_file
from deslo_plugin.config.optimizer import read_optimizer
from deslo_plugin.config.periods import adaptive_asked
from deslo_plugin.config.reader import Reader, did_you_mean, repr_with_type
from deslo_plugin.config.schema import (
    AVERAGE_AT,
    CHECKPOINT_MODES,
    DIGESTS,
    INITIAL_PARAMS,
    REPLICA_WEIGHTS,
    STATE_DICTS,
    TRANSPORTS,
    Config,
    DesloConfig,
    OptimizerConfig,
)
from deslo_plugin.config.switch import placed, refuse_switch
from deslo_plugin.config.telemetry import read_telemetry
from deslo_plugin.config.wire import Wire, read_wire, settle_wire
from deslo_plugin.errors import ConfigError

RENAMED_DESLO = {
    "when": "average_at",
    "delay": "sync_delay",
    "weights": "replica_weights",
    "bucket_mb": "bucket_cap_mb",
    "overlap": "overlap_comm",
    "checkpoint": "checkpoint_mode",
}
RENAMED_VALUES = {
    "before_update": "before_step",
    "after_update": "after_step",
    "equal": "uniform",
    "average": "averaged",
    "exact": "per_replica",
    "sync": "synchronized",
}


def load_config(source: "Config | Mapping[str, Any] | str | Path") -> Config:
    """Reads both blocks from a dict or a ``.json``/``.yaml`` file; other top-level keys (DeepSpeed's) are not read.

    Raises ``ConfigError`` for anything unknown, mistyped, out of range, or without effect.
    """
    if isinstance(source, Config):
        return source
    blocks = source if isinstance(source, Mapping) else read_file(Path(source))
    deslo, block = read_deslo(blocks.get("deslo", {})), blocks.get("optimizer")
    kind = block.get("type", "DesLoc") if isinstance(block, Mapping) else "DesLoc"
    if deslo.sync_every is not None and (block is None or kind != "DesLoc"):
        refuse_switch(block)
        return whole(None, deslo)
    optimizer = Reader("optimizer", {} if block is None else block)
    if isinstance(kind, str) and kind != "DesLoc" and not did_you_mean(kind, ["DesLoc"]):
        optimizer.refuse(
            "type",
            '"DesLoc", or the periods of this optimizer\'s states in deslo.sync_every',
            repr_with_type(kind),
            'set it to "DesLoc", or write "deslo": {"sync_every": {"params": 16, "exp_avg": 48, ...}} for any other',
        )
    optimizer.choice("type", "DesLoc", ["DesLoc"])
    params = optimizer.pop("params", {})
    optimizer.finish()
    if deslo.sync_every is not None:
        raise ConfigError("deslo.sync_every", "none beside DesLoc", "one", "move it to optimizer.params.sync_every")
    return whole(read_optimizer(params), deslo)


def read_deslo(block: Any) -> DesloConfig:
    """``deslo`` -> ``DesloConfig``."""
    reader, default = Reader("deslo", block, renamed=RENAMED_DESLO), DesloConfig()
    average_at = reader.choice("average_at", default.average_at, AVERAGE_AT, renamed=RENAMED_VALUES)
    before = average_at == "before_step"
    if not before and reader.peek("overlap_comm"):
        reader.refuse(
            "overlap_comm", "false with average_at 'after_step'", "true", "remove one: nothing can overlap there"
        )
    config = DesloConfig(
        replica_size=reader.positive_int("replica_size", default.replica_size, also=("auto",)),
        synchronous_steps=reader.positive_int("synchronous_steps", default.synchronous_steps, also=(0,)),
        sync_every=_stock_periods(reader),
        average_at=average_at,
        overlap_comm=reader.boolean("overlap_comm", default.overlap_comm and before),
        sync_delay=reader.positive_int("sync_delay", default.sync_delay),
        fragments=reader.positive_int("fragments", default.fragments, also=("auto",)),
        wire=read_wire(reader),
        bucket_cap_mb=reader.positive_int("bucket_cap_mb", default.bucket_cap_mb),
        initial_params=reader.choice("initial_params", default.initial_params, INITIAL_PARAMS),
        on_nonfinite=reader.choice("on_nonfinite", default.on_nonfinite, ["stop", "skip"]),
        timeout_s=reader.number("timeout_s", default.timeout_s, low=1.0),
        checkpoint_mode=reader.choice(
            "checkpoint_mode", default.checkpoint_mode, CHECKPOINT_MODES, renamed=RENAMED_VALUES
        ),
        state_dict=reader.choice("state_dict", default.state_dict, STATE_DICTS),
        checkpoint_digest=reader.choice("checkpoint_digest", default.checkpoint_digest, DIGESTS),
        replica_weights=reader.choice(
            "replica_weights", default.replica_weights, REPLICA_WEIGHTS, renamed=RENAMED_VALUES
        ),
        transport=reader.choice("transport", default.transport, TRANSPORTS),
        telemetry=read_telemetry(reader),
    )
    reader.finish()
    if config.telemetry and config.telemetry.pseudo_gradient and config.sync_delay > 1:
        reader.refuse(
            "telemetry.pseudo_gradient",
            "false with a sync_delay above 1",
            "true",
            "remove one: parameters have moved on when such an average lands",
        )
    if config.sync_delay > 1 and not config.overlap_comm:
        reader.refuse(
            "sync_delay",
            "1 without overlap_comm",
            str(config.sync_delay),
            "remove it, or take average_at 'before_step' with overlap_comm",
        )
    return config


def check_periods(deslo: DesloConfig, periods: Schedule, of: str = "") -> None:
    """Refuses periods that cannot be kept.

    One shorter than ``deslo.sync_delay``: its next average would start before this one has landed. An adaptive one
    where replicas are weighted, since the drift that it goes by is that of equals, or where states are averaged in
    fragments, each of which would choose another. All shorter than there are fragments.
    """
    for state, period in shortest(periods).items():
        if period and period < deslo.sync_delay:
            raise ConfigError(
                "deslo.sync_delay",
                f"at most {period}, the period of {state}{of}",
                str(deslo.sync_delay),
                "lower it, or raise that period",
            )
    longest_period = max(filter(None, longest(periods).values()), default=1)
    if deslo.fragments > longest_period:
        raise ConfigError(
            "deslo.fragments",
            f"at most {longest_period}, the longest period{of}",
            str(deslo.fragments),
            "lower it: a step takes one fragment of a state, not less",
        )
    for state in adaptive(periods):
        if deslo.fragments > 1:
            raise ConfigError(
                "deslo.fragments",
                f"1 with an adaptive period of {state}{of}",
                str(deslo.fragments),
                "remove it, or give that state a number of steps: each fragment would choose a period of its own",
            )
        if deslo.replica_weights != "uniform":
            raise ConfigError(
                "deslo.replica_weights",
                f'"uniform" with an adaptive period of {state}{of}',
                repr(deslo.replica_weights),
                "remove it, or give that state a number of steps",
            )


def whole(optimizer: OptimizerConfig | None, deslo: DesloConfig) -> Config:
    """Both blocks as they were read, ``fragments`` as a number. Raises ``ConfigError`` if they do not go together."""
    periods, asked = Config(optimizer=optimizer, deslo=deslo).schedule, cast(int | str, deslo.fragments)
    if asked == "auto":
        deslo = replace(deslo, fragments=min(filter(None, shortest(periods).values())))
    if deslo.fragments > 1 and optimizer is not None and optimizer.reset_momenta:
        raise ConfigError(
            "deslo.fragments",
            "1 with reset_momenta",
            str(deslo.fragments),
            "remove one: bias correction counts the updates since a reset for a parameter, not for parts of it",
        )
    if deslo.fragments > 1 and deslo.state_dict == "last_average":
        raise ConfigError(
            "deslo.fragments",
            '1 with state_dict "last_average"',
            str(deslo.fragments),
            "remove one: the last averages of fragments are of different steps",
        )
    if deslo.sync_delay > 1:
        others: dict[str, object] = {"a stock optimizer": True}
        if optimizer is not None:
            others = {"outer_optimizer": optimizer.outer_optimizer, "reset_momenta": optimizer.reset_momenta}
        for other in (name for name, given in others.items() if given):
            raise ConfigError(
                "deslo.sync_delay",
                f"1 with {other}",
                str(deslo.sync_delay),
                "remove one: it cannot take in an average that is some updates old",
            )
    rules = {} if optimizer is None else optimizer.by_rule
    for each in [one.periods for one in rules.values()] or [periods]:
        check_periods(deslo, each)
        periods = {**each, **periods}
    deslo = replace(deslo, wire=settle_wire(deslo.wire, longest(periods)))
    return Config(optimizer=optimizer and placed(optimizer, deslo), deslo=deslo)


def as_dict(config: Config) -> dict[str, Any]:
    """Flat ``{"optimizer.lr": ..., "deslo.average_at": ...}``: what ranks compare with each other."""
    return {
        f"{block.name}.{name}": str(value)
        for block in fields(config)
        for part in [getattr(config, block.name)]
        if part is not None
        for field in fields(part)
        for name, value in _keys_of(field.name, getattr(part, field.name)).items()
    }


def _keys_of(name: str, value: Any) -> Mapping[str, Any]:
    """The keys of the user's that ``value`` was read from."""
    if not isinstance(value, Wire):
        return {name: value}
    asked = {"wire_dtype": value.of_all if value.of is None else value.of}
    return asked | {"wire_difference": value.difference, "wire_feedback": value.feedback}


def _stock_periods(reader: Reader) -> Periods | None:
    block = reader.pop("sync_every")
    if block is None:
        return None
    every = Reader(f"{reader.where}.sync_every", block)
    periods: dict[str, int | None] = {PARAMS: every.positive_int(PARAMS)}
    for state in block:
        if state != PARAMS:
            hint = "give steps: periods adapt with DesLoc only" if adaptive_asked(every, state) else ""
            periods[state] = every.positive_int(state, also=(None,), hint=hint)
    every.finish()
    return periods
