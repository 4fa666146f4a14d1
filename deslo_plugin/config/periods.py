"""Which momenta the user asked for, and which period each state gets and why.

A period left out takes the papers' robust default, 3x that of ``params`` for a first momentum and 6x for the second
(arXiv 2505.22549, App. I); ``"half_life"`` is round(tau(beta)) of that momentum; ``null`` is never; ``"adaptive"``, or
``{"adaptive": {"min": ..., "max": ..., "drift": ...}}``, follows the drift that averages find.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deslo_plugin.algorithm.adaptive_periods import Adaptive, Schedule, adaptive, params_period
from deslo_plugin.algorithm.schedule import half_life, half_life_period
from deslo_plugin.algorithm.state_names import PARAMS, SECOND_MOMENT, first_momenta
from deslo_plugin.config.reader import Reader, repr_with_type
from deslo_plugin.errors import ConfigError

DEFAULT_PERIOD = 32
MULTIPLE_OF_PARAMS = {"first": 3, "second": 6}
LONGEST, DRIFT = 16, 0.5  # of an adaptive period: times the shortest, and what its averages should find


@dataclass(frozen=True)
class Momenta:
    """``sync_every`` holds, by state name, what was written inside ``momenta`` and ``second_moment``."""

    betas: tuple[float, ...]
    weights: tuple[float, ...]
    beta2: float | None
    sync_every: Mapping[str, Any]

    @property
    def beta_of(self) -> dict[str, float]:
        """State name -> beta."""
        first = dict(zip(first_momenta(len(self.betas)), self.betas))
        return first if self.beta2 is None else first | {SECOND_MOMENT: self.beta2}


def read_momenta(reader: Reader, *, adaptive: bool, beta: float = 0.9) -> Momenta:
    """The momenta of ``optimizer.params``, from ``betas`` (one of weight 1, ``beta`` by default) or ``momenta`` and
    ``second_moment``."""
    betas, entries, second = (reader.pop(key) for key in ("betas", "momenta", "second_moment"))
    if entries is None and second is None:
        return _from_betas(reader, betas, [beta, 0.95] if adaptive else [beta])
    if betas is not None:
        reader.refuse("betas", "either betas or momenta/second_moment", "both", "keep one form")
    if not isinstance(entries, list) or not entries:
        reader.refuse(
            "momenta", "a list of {beta, weight, sync_every}", repr_with_type(entries), "give at least one momentum"
        )

    sync_every: dict[str, Any] = {}
    first = []
    for j, (state, entry) in enumerate(zip(first_momenta(len(entries)), entries)):
        one = Reader(f"{reader.where}.momenta[{j}]", entry)
        first.append((one.number("beta", below=1.0), one.number("weight", 1.0 if len(entries) == 1 else None)))
        sync_every |= _taken(one, "sync_every", state)
        one.finish()
    total = math.fsum(weight for _, weight in first)
    if total > 1 + 1e-9:
        reader.refuse(
            "momenta",
            "weights that sum to at most 1",
            f"{total:g}",
            "lower them: what is left of 1 is the weight of the raw gradient",
        )
    beta2 = None
    if adaptive:
        one = Reader(f"{reader.where}.second_moment", second if second is not None else {})
        beta2 = one.number("beta", 0.95, below=1.0)
        sync_every |= _taken(one, "sync_every", SECOND_MOMENT)
        one.finish()
    return Momenta(tuple(beta for beta, _ in first), tuple(weight for _, weight in first), beta2, sync_every)


def _from_betas(reader: Reader, betas: Any, default: list[float]) -> Momenta:
    betas = default if betas is None else betas
    if not isinstance(betas, list) or len(betas) != len(default):
        reader.refuse("betas", f"a list like {default}", repr_with_type(betas), "correct the list")
    each = Reader(f"{reader.where}.betas", {str(i): beta for i, beta in enumerate(betas)})
    beta1, *beta2 = (each.number(str(i), below=1.0) for i in range(len(betas)))
    return Momenta((beta1,), (1.0,), beta2[0] if beta2 else None, {})


def read_periods(reader: Reader, momenta: Momenta) -> tuple[Schedule, dict[str, str]]:
    """(period of every state, why it is what it is), from ``sync_every`` and what the momenta carry themselves."""
    where, block = f"{reader.where}.sync_every", reader.pop("sync_every", {})
    every = Reader(where, block)
    for state in momenta.sync_every:
        if state in every:
            raise ConfigError(f"{where}.{state}", "one period", "two (the momentum has its own)", "keep one")
    every = Reader(where, {**block, **momenta.sync_every})

    periods: dict[str, int | Adaptive | None] = {}
    sources = {}
    sources[PARAMS] = "given" if PARAMS in every else "default"
    periods[PARAMS] = _period(every, PARAMS, None, DEFAULT_PERIOD)
    for state, beta in momenta.beta_of.items():
        if state in every:
            half_life_asked = {**block, **momenta.sync_every}[state] == "half_life"
            sources[state] = f"half-life of {beta:g}" if half_life_asked else "given"
            periods[state] = _period(every, state, beta, params_period(periods))
        else:
            multiple = MULTIPLE_OF_PARAMS["second" if state == SECOND_MOMENT else "first"]
            sources[state] = f"{multiple} x params"
            periods[state] = every.pop(state, multiple * params_period(periods))
    every.finish()
    return periods, sources


def group_periods(sync_every: Any, periods: Schedule, beta_of: Mapping[str, float], where: str) -> Schedule:
    """A param group's own ``sync_every`` over the config's: states it does not name keep the config's period."""
    own = Reader(f"{where}.sync_every", sync_every)
    resolved: dict[str, int | Adaptive | None] = {}
    for state, period in periods.items():
        params = params_period(resolved) if resolved else 0  # which come first, and ask for none
        resolved[state] = _period(own, state, beta_of.get(state), params) if state in own else own.pop(state, period)
    own.finish()
    for state, bounds in adaptive(resolved).items():
        if bounds.min % params_period(resolved):
            raise ConfigError(
                f"{where}.sync_every.{state}",
                f"a multiple of {resolved[PARAMS]}, this group's period of {PARAMS}, as min",
                f"{bounds.min}, the config's",
                f"give {state} a period here as well",
            )
    return resolved


def _period(reader: Reader, state: str, beta: float | None, params: int) -> int | None | Adaptive:
    """The period written for one state. ``beta`` is None for the parameters, which must meet at some time.

    ``params`` is the parameters' period, for which their own is the default.
    """
    asked = adaptive_asked(reader, state)
    if beta is None:
        return reader.positive_int(
            state, params, hint="give steps: adaptive periods are multiples of this one" if asked else ""
        )
    if asked:
        return _adaptive(reader, state, params)
    hint = f"(the half-life of beta {beta:g} is {half_life(beta):.1f} steps)"
    period = reader.positive_int(
        state, also=("half_life", None), hint=f'give steps, "half_life" {hint}, "adaptive", or null for never'
    )
    return half_life_period(beta) if period == "half_life" else period


def adaptive_asked(reader: Reader, state: str) -> bool:
    """Whether an adaptive period is written for ``state``."""
    written = reader.peek(state)
    return written == "adaptive" or isinstance(written, Mapping)


def _adaptive(reader: Reader, state: str, params: int) -> Adaptive:
    written = reader.pop(state)
    form = Reader(f"{reader.where}.{state}", {} if written == "adaptive" else written)
    bounds = Reader(f"{form.where}.adaptive", form.pop("adaptive", {}))
    form.finish()
    shortest = bounds.positive_int("min", params)
    longest = bounds.positive_int("max", LONGEST * shortest)
    drift = bounds.number("drift", DRIFT)
    bounds.finish()
    if shortest % params:
        bounds.refuse(
            "min", f"a multiple of {params}, the period of {PARAMS}", str(shortest), "averages must fall together"
        )
    if longest not in (shortest << doubled for doubled in range(1, 64)):
        bounds.refuse(
            "max", f"{shortest} (min) times 2, 4, 8, ...", str(longest), "correct it; for one period write its steps"
        )
    if drift == 0:
        bounds.refuse("drift", "a number > 0", "0", f"write {shortest} to average at the shortest period always")
    return Adaptive(shortest, longest, drift)


def _taken(reader: Reader, key: str, state: str) -> dict[str, Any]:
    """``{state: value}`` if ``key`` was written, else nothing (a written null means never)."""
    written = key in reader
    value = reader.pop(key)
    return {state: value} if written else {}
