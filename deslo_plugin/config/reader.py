"""How a mapping written by a person is read: every key known, every value checked, every error says what to do.

Errors have the form *where: expected what, got what; do what*.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

from deslo_plugin.errors import ConfigError


def repr_with_type(value: Any) -> str:
    """A value as an error message quotes it, with its type where the type is what is wrong."""
    return f"{value!r} ({type(value).__name__})"


def plain(value: Any) -> Any:
    """``value`` in Python's own types, whatever library's mappings, sequences and numbers it is made of."""
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):  # numpy's and torch's
        return value.tolist()
    if isinstance(value, bool | int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


class Reader:
    """Takes values out of ``mapping`` one by one; ``finish`` refuses what nothing has popped.

    ``where`` is the path of the mapping in the user's file ("optimizer.params"), the start of every message;
    ``renamed`` is what keys of earlier versions are called now.
    """

    def __init__(self, where: str, mapping: Any, renamed: Mapping[str, str] | None = None):
        if not isinstance(mapping, Mapping):
            raise ConfigError(where, "a mapping of keys to values", repr_with_type(mapping), "write {...} there")
        self.where, self._rest = where, plain(mapping)
        self._known: list[str] = []
        for old, new in (renamed or {}).items():
            if old in self._rest:
                self.refuse(old, f"its name of today, {new}", "an old one", f"write {new}")

    def __contains__(self, key: str) -> bool:
        return key in self._rest

    def peek(self, key: str) -> Any:
        """The raw value, left to be popped; None where there is none."""
        return self._rest.get(key)

    def pop(self, key: str, default: Any = None) -> Any:
        """The raw value, unchecked."""
        self._known.append(key)
        return self._rest.pop(key, default)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        low: float = 0.0,
        above: float | None = None,
        below: float | None = None,
    ) -> float:
        """A float in [low, below) or [low, inf), or greater than ``above``."""
        least = f">= {low:g}" if above is None else f"> {above:g}"
        value, bounds = self.pop(key, default), f"a number {least}" + (f" and < {below:g}" if below else "")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, bounds, repr_with_type(value), self._hint(value))
        enough = low <= value if above is None else above < value
        if not (enough and value < (below or float("inf"))):
            self.refuse(key, bounds, repr(value), "choose a value in that range")
        return float(value)

    def positive_int(self, key: str, default: Any = None, *, also: tuple[Any, ...] = (), hint: str = "") -> Any:
        """An int >= 1, or one of the values in ``also``."""
        value = self.pop(key, default)
        if value in also and not isinstance(value, bool):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            options = "".join(f", {'null' if option is None else repr(option)}" for option in also)
            self.refuse(key, f"a whole number >= 1{options}", repr_with_type(value), hint or self._hint(value))
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.pop(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", repr_with_type(value), "write true or false without quotes")
        return value

    def choice(
        self, key: str, default: str, options: Iterable[str], *, renamed: Mapping[str, str] | None = None
    ) -> str:
        """One of ``options``; ``renamed`` is what values of earlier versions are called now."""
        value, options = self.pop(key, default), tuple(options)
        if value not in options:
            today = (renamed or {}).get(value) if isinstance(value, str) else None
            do = f"write {today!r}, its name of today" if today else did_you_mean(str(value), options) or "choose one"
            self.refuse(key, "one of " + ", ".join(options), repr_with_type(value), do)
        return value

    def refuse(self, key: str, expected: str, got: str, do: str) -> NoReturn:
        """Raises ``ConfigError`` about ``key``."""
        raise ConfigError(f"{self.where}.{key}", expected, got, do)

    def finish(self) -> None:
        """Refuses keys that nothing asked for, with the nearest known key."""
        for key in self._rest:
            known = ", ".join(sorted(set(self._known)))
            raise ConfigError(
                f"{self.where}.{key}",
                f"a known key ({known})",
                "an unknown one",
                did_you_mean(str(key), self._known) or "remove it",
            )

    @staticmethod
    def _hint(value: Any) -> str:
        if value == "auto":
            return 'give the value here: "auto" is filled only where the Hugging Face integration knows it'
        if isinstance(value, str):
            return "write it without quotes (in YAML, 1e-4 is text: write 1.0e-4)"
        return "correct the value" if value is not None else "give it"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the option closest to ``word``, or nothing."""
    match = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else ""
