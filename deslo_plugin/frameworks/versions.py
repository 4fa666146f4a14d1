"""Which releases of torch and of the frameworks this package works with; docs/versions.md has what was run."""

import re
from importlib import import_module

from deslo_plugin.errors import ConfigError, require

SUPPORTED = {  # from, and below; the same as in pyproject.toml
    "torch": ("2.9", None),
    "deepspeed": ("0.16", "0.20"),
    "accelerate": ("1.10", None),
    "transformers": ("4.51", None),
    "lightning": ("2.6", None),
}


def release(package: str) -> tuple[int, ...]:
    """The numbers of an imported package's version: (2, 13, 0) of "2.13.0+cpu"."""
    return _numbers(import_module(package).__version__)


def expect(package: str) -> None:
    """Raises ``ConfigError`` if the imported release of ``package`` is not one of ``SUPPORTED``."""
    low, below = SUPPORTED[package]
    found = release(package)
    if found < _numbers(low) or (below is not None and found >= _numbers(below)):
        pin = f"{package}>={low}" + (f",<{below}" if below else "")
        raise ConfigError(
            package,
            f"{low} or later" + (f", before {below}" if below else ""),
            import_module(package).__version__,
            f"pip install '{pin}'",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, require(re.match(r"\d+(\.\d+)*", version))[0].split(".")))
