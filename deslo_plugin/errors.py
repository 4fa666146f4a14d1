"""What this package raises. An error says *where: expected what, got what; do what*."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be meant: *where: expected what, got what; do what*."""

    def __init__(self, where: str, expected: str, got: str, do: str):
        super().__init__(f"{where}: expected {expected}, got {got}; {do}")
        self._parts = where, expected, got, do

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, str, str, str]]:
        return ConfigError, self._parts  # it travels between ranks

    def on(self, ranks: Sequence[int]) -> "ConfigError":
        """The same, of ``ranks`` only."""
        where, expected, got, do = self._parts
        return ConfigError(where, expected, f"{got} on rank(s) {list(ranks)}", do)


class AverageError(RuntimeError):
    """An average did not arrive: a replica died, hangs, or is too slow. Nothing of it was written."""


class NonFiniteError(FloatingPointError):
    """A replica brought NaN or inf to an average. Raised on every rank of every replica; nothing was written."""


def require(value: T | None) -> T:
    """``value``, where its caller knows that it is there and its type cannot say so. Raises ``RuntimeError`` if not."""
    if value is None:
        raise RuntimeError("expected a value that is there by now, got None; report this as a bug")
    return value
