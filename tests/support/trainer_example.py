"""The Hugging Face Trainer's example, as a launcher starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.launching import launched

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
EXAMPLE = [
    str(ROOT / "examples" / "hf_trainer.py"),
    "--config",
    str(ROOT / "configs" / "des-loc-adam.json"),
    "--steps",
    "40",
]

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "4"]


def run_example(launch, options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ENVIRONMENT
    run = subprocess.run(
        [*launch, *EXAMPLE, *options], capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stderr[-20_000:]
    return result(run.stdout)


def run_on_forked_ranks(folder: Path, options: list[str]) -> dict:
    """As ``run_example`` with ``TORCHRUN``."""
    return result(launched([*EXAMPLE, *options], 4, folder, cwd=ROOT, **ENVIRONMENT)[0])


def result(said: str) -> dict:
    return json.loads(next(line for line in said.splitlines() if line.startswith('{"loss"')))
