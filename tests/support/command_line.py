"""Commands of ``deslo`` in this process, and what they answer."""

import json
from pathlib import Path

from typer.testing import CliRunner

from deslo_plugin.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
DES_LOC = str(ROOT / "configs" / "des-loc-adam.json")  # 2 ranks per replica, 32 / 96 / 192


def run(*arguments: str, status: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def answer(*arguments: str, status: int = 0) -> dict:
    return json.loads(run(*arguments, "--json", status=status).stdout)
