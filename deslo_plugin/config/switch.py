"""``optimizer.params.switch``: read, compared with the warm-up and the end of a run, and with that of a checkpoint."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from deslo_plugin.algorithm.state_names import SECOND_MOMENT, first_momenta
from deslo_plugin.algorithm.switch import Switch
from deslo_plugin.config.periods import Momenta
from deslo_plugin.config.reader import Reader, did_you_mean, repr_with_type
from deslo_plugin.config.schema import Config, DesloConfig, OptimizerConfig
from deslo_plugin.errors import ConfigError

WHERE = "optimizer.params.switch"


def read_switch(reader: Reader, momenta: Momenta) -> Switch | None:
    """What stands under ``switch`` of ``optimizer.params``; ``at`` is 0 where the end of the warm-up is meant."""
    block = reader.pop("switch")
    if block is None:
        return None
    one, names = Reader(f"{reader.where}.switch", block), first_momenta(len(momenta.betas))
    at = one.positive_int("at", None, also=(None,))
    betas = _one_each(one, "betas", momenta.betas, names, below=1.0)
    weights = _one_each(one, "weights", momenta.weights, names)
    total = math.fsum(weights)
    if total > 1 + 1e-9:
        one.refuse(
            "weights",
            "weights that sum to at most 1",
            f"{total:g}",
            "lower them: what is left of 1 is the weight of the raw gradient",
        )
    before, after = zip(momenta.betas, momenta.weights), zip(betas, weights)
    changed = tuple(name for name, old, new in zip(names, before, after) if old != new)
    factor = one.number("lr_factor", 1.0, above=0.0)
    reset = _reset(one, names, changed)
    one.finish()
    if not changed and not reset and factor == 1.0:
        reader.refuse(
            "switch",
            "another beta or weight than before it, a momentum to reset, or an lr_factor other than 1",
            "none of them",
            "say what changes, or remove it",
        )
    return Switch(at=at or 0, betas=betas, weights=weights, lr_factor=factor, reset=reset)


def _one_each(
    reader: Reader, key: str, before: tuple[float, ...], names: Sequence[str], below: float | None = None
) -> tuple[float, ...]:
    """A number for each first momentum, by default as ``before``."""
    written = reader.pop(key)
    if written is None:
        return before
    if not isinstance(written, list) or len(written) != len(names):
        count = f"{len(names)} number{'s' if len(names) > 1 else ''}, one for each first momentum ({', '.join(names)})"
        do = "declare as many in optimizer.params.momenta, with weight 0 those that begin at the switch"
        reader.refuse(key, f"a list of {count}", repr_with_type(written), f"{do}; the second moment keeps its beta")
    each = Reader(f"{reader.where}.{key}", {str(i): number for i, number in enumerate(written)})
    return tuple(each.number(str(i), below=below) for i in range(len(names)))


def _reset(reader: Reader, names: Sequence[str], changed: tuple[str, ...]) -> tuple[str, ...]:
    written = reader.pop("reset")
    if written is None:
        return changed
    known = f"a list of first momenta, of {', '.join(names)}"
    if not isinstance(written, list):
        reader.refuse("reset", known, repr_with_type(written), "write a list, [] for none")
    for name in written:
        if name not in names or written.count(name) > 1:
            do = "the second moment is kept" if name == SECOND_MOMENT else did_you_mean(str(name), names)
            got = f"{name} twice" if name in names else repr(name)
            reader.refuse("reset", known, got, f"{do}; remove it".removeprefix("; "))
    return tuple(name for name in names if name in written)


def refuse_switch(block: Any) -> None:
    """Raises ``ConfigError`` for a switch in the ``optimizer`` block of a stock optimizer."""
    params = block.get("params") if isinstance(block, Mapping) else None
    if isinstance(params, Mapping) and "switch" in params:
        kind = repr(block.get("type"))
        raise ConfigError(
            WHERE, 'none but with "type": "DesLoc"', f"one with {kind}", "remove it, or train with DesLoc"
        )


def switch_of_group(own: Any, switch: Switch | None, where: str) -> dict[str, Any] | None:
    """What a param group says of the config's ``switch``. Raises ``ConfigError`` for one of its ``own``."""
    known = None if switch is None else switch.as_dict()
    if own not in (None, known):
        raise ConfigError(f"{where}.switch", "none: one switch is made for all", repr(own), f"write it to {WHERE}")
    return known


def placed(optimizer: OptimizerConfig, deslo: DesloConfig) -> OptimizerConfig:
    """``optimizer`` with its switch at a step. Raises ``ConfigError`` for one before the warm-up ends."""
    switch, warm_up = optimizer.switch, deslo.synchronous_steps
    if switch is None:
        return optimizer
    if not switch.at and not warm_up:
        raise ConfigError(
            f"{WHERE}.at",
            "a step, where no synchronous warm-up ends",
            "none",
            "give it, or deslo.synchronous_steps, whose end it is by default",
        )
    if switch.at and switch.at < warm_up:
        raise ConfigError(
            f"{WHERE}.at",
            f"at least {warm_up}, where deslo.synchronous_steps ends",
            str(switch.at),
            "raise it, or leave it out: it is the end of the warm-up then",
        )
    at, beside = switch.at or warm_up, optimizer.beside
    if beside is not None and beside.switch is not None:
        beside = replace(beside, switch=replace(beside.switch, at=at))
    return replace(optimizer, switch=replace(switch, at=at), beside=beside)


def refuse_after_the_end(config: Config, steps: int, of: str) -> None:
    """Raises ``ConfigError`` for a switch that a run of ``steps`` steps, which ``of`` says, does not come to."""
    switch = config.switch
    if switch is not None and switch.at >= steps:
        raise ConfigError(
            f"{WHERE}.at",
            f"fewer than {steps:,}, the steps of the run ({of})",
            f"{switch.at:,}",
            "lower it (or deslo.synchronous_steps, where it is at its end), or raise the steps: nothing would switch",
        )


def refuse_other_switch(where: str, before: Switch | None, now: Switch | None, steps: int) -> None:
    """Raises ``ConfigError`` where states after ``steps`` steps, whose run has the switch ``before``, are no states of
    a run that has ``now``. What has not begun may differ: it begins with step number ``at``."""

    def made(switch: Switch | None) -> Switch | None:
        return switch if switch is not None and steps > switch.at else None

    def refuse(expected: str, got: str, do: str) -> NoReturn:
        raise ConfigError(f"{where}: {WHERE}", expected, got, do)

    if made(before) == made(now):
        return
    if past := made(before):
        refuse(
            f"the switch that these states have made, {past}",
            str(now) if now else "none",
            "write it as it was, its at included",
        )
    refuse(
        f"at {steps:,} or later: so many steps are complete, and these states have not switched",
        str(now),
        f"set at (or deslo.synchronous_steps) to {steps}, at which the next step begins, or load earlier states",
    )
