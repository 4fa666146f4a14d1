"""``deslo``: what will it save on my link, is it really running, what is in this checkpoint? One command each."""

import sys
from importlib.util import find_spec


def main() -> None:
    """The console script, and ``python -m deslo_plugin.cli``."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        sys.exit(f"deslo: expected typer and rich, missing {' and '.join(missing)}; pip install 'deslo-plugin[cli]'")
    from deslo_plugin.cli.app import app

    app(prog_name="deslo")
