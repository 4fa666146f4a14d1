"""The two commands for a script that cannot be edited, as real processes of real launchers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys, torch, deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first, for inference only
model = torch.nn.Linear(4, 1)
with torch.no_grad():
    model.weight.fill_(0.5), model.bias.zero_()
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=sys.argv[-1])
for step in range(5):
    engine.backward(engine(torch.full((2, 4), float(torch.distributed.get_rank() + step))).mean())
    engine.step()
sys.stdout.write(f"sent {dict(engine.deslo.stats.bytes)}\\n")
sys.stdout.flush()
torch.distributed.barrier()
os._exit(0)  # the libraries' own threads abort now and then as they end
"""


def launched(command: list[str], tmp_path: Path) -> subprocess.CompletedProcess:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "DesLoc", "params": {"lr": 0.01, "sync_every": {"params": 2}}},
        "deslo": {"replica_size": 1},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [*command, str(tmp_path / "train.py"), str(tmp_path / "ds.json")],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    "command",
    [
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "deslo_plugin.run",
        ],
        ["deepspeed", "--num_gpus", "2", "--module", "deslo_plugin.run"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_a_script_that_knows_nothing_of_us_trains_with_desloc(command, tmp_path):
    done = launched(command, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    # 4 weights and 1 bias, which ZeRO pads to 6 floats; averaged after steps 2 and 4 on both ranks
    assert done.stdout.count("sent {'params': 56}") == 2, done.stdout[-2000:]


def test_a_missing_script_is_a_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "deslo_plugin.run"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 1 and "expected the path of a training script" in done.stderr
