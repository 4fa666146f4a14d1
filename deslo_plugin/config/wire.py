"""What states travel as: ``deslo.wire_dtype``, ``wire_difference`` and ``wire_feedback``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deslo_plugin.algorithm.schedule import Periods
from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.config.reader import Reader, did_you_mean, repr_with_type
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.quantize import FORMATS, ROOTED, Format

PLAIN = ("float32", "float64")
NEVER_NEGATIVE = (
    *("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"),
    *("row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col"),  # Adafactor's, torch's and transformers'
    *("acc_delta", "exp_inf", "step_size"),  # Adadelta's, Adamax's, Rprop's
)
"""Second moments and other states that are never negative, and that updates take roots of or divide by, by name."""
AUTO = "auto"
CENTRED = ("square_avg", "grad_avg")
"""The states of centred RMSprop."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What states travel as.

    ``of_all`` is the dtype of every state that ``of`` does not name. Of a state in ``difference`` replicas send how far
    they went from its last mean, and what was lost of one in ``feedback`` is sent with its next average; None is what
    ``settle_wire`` chooses once the states are known."""

    of_all: str = "float32"
    of: Mapping[str, str] | None = None
    difference: tuple[str, ...] | None = ()
    feedback: tuple[str, ...] | None = ()

    @property
    def plain(self) -> str:
        """The dtype of what is not quantised: gradients, buffers, words."""
        return self.of_all if self.of_all in PLAIN else "float32"

    @property
    def quantizes(self) -> bool:
        """Whether any state travels in few bits."""
        return any(name not in PLAIN for name in [self.of_all, *(self.of or {}).values()])

    def name_of(self, state: str) -> str:
        return self.of_all if self.of is None else self.of.get(state, "float32")

    def format_of(self, state: str) -> Format | None:
        """That of its records; None if it travels as it is."""
        name = self.name_of(state)
        return None if name in PLAIN else (ROOTED if state in NEVER_NEGATIVE else FORMATS)[name]


def read_wire(reader: Reader) -> Wire:
    """The three keys of ``deslo``, which ``settle_wire`` looks at once it is known what averages."""
    asked, names = reader.peek("wire_dtype"), (*PLAIN, *FORMATS)
    if isinstance(asked, Mapping):
        reader.pop("wire_dtype")
        each = Reader(f"{reader.where}.wire_dtype", asked)
        of = {state: each.choice(state, "", [name for name in names if name != "float64"]) for state in asked}
        of_all = "float32"
    else:
        of, of_all = None, reader.choice("wire_dtype", "float32", names)
    difference, feedback = (_states(reader, f"wire_{key}") for key in ("difference", "feedback"))
    return Wire(of_all=of_all, of=of, difference=difference, feedback=feedback)


def _states(reader: Reader, key: str) -> tuple[str, ...] | None:
    value = reader.pop(key, AUTO)
    if value == AUTO:
        return None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        reader.refuse(key, f'"{AUTO}" or a list of states', repr_with_type(value), 'write it as ["params"]')
    return tuple(dict.fromkeys(value))


def settle_wire(wire: Wire, periods: Periods) -> Wire:
    """``wire`` for states of these ``periods``. Raises ``ConfigError`` for what has no effect on any of them."""
    averaged = [state for state, period in periods.items() if period]
    quantized = [state for state in averaged if wire.format_of(state)]
    for state in wire.of or ():
        if state not in averaged:
            _refuse(
                f"deslo.wire_dtype.{state}",
                f"a state that averages ({', '.join(averaged)})",
                "one that does not" if state in periods else "an unknown one",
                did_you_mean(str(state), averaged) or "remove it",  # YAML's keys may be numbers
            )
    centred = [state for state in quantized if state in CENTRED]
    if centred and all(state in averaged for state in CENTRED):
        _refuse(
            f"deslo.wire_dtype of {centred[0]}",
            f"float32 for {' and '.join(CENTRED)}, of which an update takes the root of {CENTRED[0]} - {CENTRED[1]}²",
            repr(wire.name_of(centred[0])),
            "give formats by name to other states: rounded, that may be negative, and its root NaN",
        )
    chosen: dict[str, Any] = {}
    for key, pays in (("difference", _differs_little), ("feedback", _loses_much)):
        asked = getattr(wire, key)
        if asked is None:
            chosen[key] = tuple(state for state in quantized if pays(state, wire.name_of(state)))
            continue
        for state in asked:
            if state not in quantized:
                _refuse(
                    f"deslo.wire_{key}",
                    f"states that travel in few bits ({', '.join(quantized) or 'none here'})",
                    repr(state),
                    "remove it, or give it a format in deslo.wire_dtype",
                )
            if key == "difference" and state in NEVER_NEGATIVE:
                _refuse(
                    f"deslo.wire_{key}",
                    "states that may be negative",
                    repr(state),
                    "remove it: the sum of its last mean and a rounded difference may fall below zero",
                )
        chosen[key] = tuple(state for state in quantized if state in asked)
    return Wire(of_all=wire.of_all, of=wire.of, **chosen)


def _differs_little(state: str, name: str) -> bool:
    """Parameters go a small part of their size between averages; a momentum is another by then."""
    return state == PARAMS


def _loses_much(state: str, name: str) -> bool:
    """By docs/wire.md: eight bits lose nothing that was seen, nor do second moments in four."""
    return name == "int4" and state not in NEVER_NEGATIVE


def _refuse(where: str, expected: str, got: str, do: str) -> None:
    raise ConfigError(where, expected, got, do)
