"""What every ``--plot`` needs: a file of a kind that can be written, and matplotlib."""

from importlib.util import find_spec
from pathlib import Path

from deslo_plugin.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")


def expect_drawable(path: Path) -> None:
    """Raises ``ConfigError`` where no figure can be written, before anything is computed for it."""
    if path.suffix not in FORMATS:
        raise ConfigError("--plot", f"a file that ends in one of {', '.join(FORMATS)}", repr(str(path)), "rename it")
    if not path.parent.is_dir():
        raise ConfigError("--plot", "an existing folder", repr(str(path.parent)), "make it first")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot", "matplotlib installed", "none", "pip install 'deslo-plugin[plot]', or leave --plot out"
        )
