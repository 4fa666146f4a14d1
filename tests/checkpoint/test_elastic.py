"""A rank is killed and its launcher starts the group again, as docs/elastic-restart.md says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import launched

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "tests" / "support" / "elastic_job.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "--max-restarts", "1"]
LAUNCHES = {
    "torchrun": [*TORCHRUN, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
    "accelerate launch": [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "3",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--max_restarts",
        "1",
        "--rdzv_backend",
        "c10d",
        "--main_process_port",
        "0",
    ],
}


def trained(launch: list[str], folder: Path, *death: int) -> tuple[int, str]:
    """(the step that training went on with last, the digest of the model that all ranks came to)."""
    folder.mkdir()
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    script = [JOB, str(folder), *map(str, death)]
    run = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=900, cwd=folder, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return come_to(run.stdout)


def come_to(said: str) -> tuple[int, str]:
    results = re.findall(r"trained from (\d+) to 14: (\w+)", said)
    assert len(results) == 3 and len(set(results)) == 1, said
    return int(results[0][0]), results[0][1]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_killed_rank_changes_no_bit(tmp_path, name):
    """Rank 1 dies in step 8; all go on from the checkpoint after step 5 and come to what they would have come to."""
    start, digest = trained(LAUNCHES[name], tmp_path / "killed", 1, 8)
    assert start == 5 and (tmp_path / "killed" / "died").exists()
    (undisturbed := tmp_path / "undisturbed").mkdir()
    said, _ = launched([JOB, undisturbed], 3, undisturbed)
    assert come_to(said) == (0, digest)
