"""What comes up on every rank of a launched command is said once, and its exit status stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SCRIPT = """
import os, sys, torch, deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first, for inference only
model = torch.nn.Linear(4, 1)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=sys.argv[-1])
sys.stdout.flush(), sys.stderr.flush()
torch.distributed.barrier()
os._exit(0)  # the libraries' own threads abort now and then as they end
"""


def launched(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*TORCHRUN, *words], capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path
    )


def run_script(tmp_path: Path, **blocks: dict) -> subprocess.CompletedProcess:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 2} | blocks))
    return launched(tmp_path, "-m", "deslo_plugin.run", "train.py", "ds.json")


def test_a_mistake_in_the_config_of_a_script_that_run_started(tmp_path):
    done = run_script(tmp_path, optimizer={"type": "DesLoc"}, deslo={"replica_size": 1, "timout_s": 5})
    assert done.returncode == 1
    assert done.stderr.count("deslo.timout_s: expected a known key") == 1, done.stderr[-3000:]


def test_a_script_that_run_started_without_anything_of_ours_in_its_config(tmp_path):
    done = run_script(tmp_path, optimizer={"type": "AdamW", "params": {"torch_adam": True}})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("write their periods into deslo.sync_every") == 1


def test_a_script_that_is_not_there(tmp_path):
    done = launched(tmp_path, "-m", "deslo_plugin.run", "nowhere.py")
    assert done.returncode == 1 and done.stderr.count("expected the path of a training script, got 'nowhere.py'") == 1


def test_a_command_that_cannot_be_carried_out(tmp_path):
    done = launched(tmp_path, "-m", "deslo_plugin.cli", "probe", "--replica-size", "3")
    assert done.stderr.count("deslo.replica_size: expected a divisor of the world size 2") == 1, done.stderr[-2000:]
    assert "exitcode  : 2" in done.stderr
