"""Which way averages travel: from device to device, or through host memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """``host``: through host memory and gloo. ``why`` is what "auto" has found; "" where the config says the way."""

    host: bool = False
    why: str = ""

    def describe(self) -> str:
        """A line of the banner; "" for what is the default and was not asked about."""
        way = "through host memory and gloo" if self.host else "from device to device"
        return f"averages travel {way}" + f" ({self.why})" * bool(self.why) if self.host or self.why else ""
