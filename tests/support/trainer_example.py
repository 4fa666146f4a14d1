"""The Hugging Face Trainer's example, as a launcher starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
EXAMPLE = [
    str(ROOT / "examples" / "hf_trainer.py"),
    "--config",
    str(ROOT / "configs" / "des-loc-adam.json"),
    "--steps",
    "40",
]


TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "4"]


def run_example(launch, options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [*launch, *EXAMPLE, *options], capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stderr[-20_000:]
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"loss"')))
