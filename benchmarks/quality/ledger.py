"""The file of finished runs: each is written at once, none is repeated, and a table that changed trains what is new."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.methods import Preset, Run

# of a preset: what runs do not say
SIZE = ("shape", "sequences", "steps", "schedule", "look", "held_out", "device", "bfloat16")


class Ledger:
    """Finished runs by their key, one to a line of a JSON file.

    Raises ``ValueError`` for a file of runs of another size: they are not comparable.
    """

    def __init__(self, path: Path, preset: Preset):
        self.path = path
        self._preset = json.loads(json.dumps(asdict(preset)))
        whole = json.loads(path.read_text()) if path.exists() else {"preset": self._preset, "runs": {}}
        if changed := [name for name in SIZE if whole["preset"][name] != self._preset[name]]:
            raise ValueError(f"{path}: expected runs of the same {', '.join(changed)}, got others; give another --out")
        self.runs: dict[str, dict[str, Any]] = whole["runs"]
        self._head = {
            "command": shlex.join(["python", "-m", "benchmarks.quality.study", *sys.argv[1:]]),
            "commit": commit(),
            "machine": f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}",
            "preset": self._preset,
        }

    def __contains__(self, run: Run) -> bool:
        return run.key in self.runs

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self.runs[run.key]["result"]

    def write(self, run: Run, result: dict[str, Any]) -> None:
        """Adds a finished run; the file is whole at every moment."""
        self.runs[run.key] = {"run": asdict(run), "result": result}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in self.runs.items())
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(f'{json.dumps(self._head)[:-1]}, "runs": {{\n{lines}}}}}\n')
        unfinished.replace(self.path)

    def final(self, run: Run) -> float | None:
        """Validation loss at the end, nats per byte; None if it diverged."""
        return self[run]["validation"][-1]


def commit() -> str:
    """The commit that the latest runs were made with, "+" where the tree differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
