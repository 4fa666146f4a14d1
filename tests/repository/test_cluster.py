"""The launch scripts: what they start exists, understands its options, and takes two nodes for two replicas."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples.harness.command import arguments

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path for path in (ROOT / "examples" / "launch").iterdir() if path.name not in ("hostfile", "torchft.sh")
)
NODE = {"HEAD": "127.0.0.1", "NODE": "1", "RANKS": "8"}
SLURM = {
    "SLURM_JOB_NODELIST": "node-[0-1]",
    "SLURM_CPUS_PER_TASK": "64",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "42",
}
STAND_INS = {
    "scontrol": "printf 'node-0\\nnode-1\\n'",
    "srun": 'exec "$@"',
    **dict.fromkeys(("torchrun", "deepspeed", "accelerate"), 'printf "%s\\0" "$(basename "$0")" "$@"'),
}


def torchrun(given: list[str]) -> tuple[str, list[str], int]:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(given)
    return args.training_script, args.training_script_args, int(args.nnodes) * int(args.nproc_per_node)


def deepspeed(given: list[str]) -> tuple[str, list[str], int]:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    args = parse_args(given)
    return args.user_script, args.user_args, sum(fetch_hostfile(ROOT / args.hostfile).values())


def accelerate(given: list[str]) -> tuple[str, list[str], int]:
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(given[1:])
    assert given[0] == "launch" and (args.num_machines, args.machine_rank) == (2, 1)
    return args.training_script, args.training_script_args, args.num_processes


LAUNCHERS = {"torchrun": torchrun, "deepspeed": deepspeed, "accelerate": accelerate}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_starts_exists_and_understands_its_options(script, tmp_path):
    """The launchers are replaced by programs that print their arguments; their own parsers read those."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | NODE | SLURM | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script, "--steps", "7"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    launcher, *given = done.stdout.rstrip("\0").split("\0")
    program, options, ranks = LAUNCHERS[launcher](given)
    assert (ROOT / program).samefile(ROOT / "examples" / "train.py") and ranks == 16
    options[options.index("--config") + 1] = str(ROOT / options[options.index("--config") + 1])
    args = arguments(options)
    assert (args.steps, args.replica_size) == (7, "auto")


def test_a_replica_is_started_until_it_ends_well(tmp_path):
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$TORCHFT_LIGHTHOUSE $@"\nmkdir "$0.again" 2>/dev/null && exit 1\nexit 0\n'
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("python", "sleep"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"HEAD": "host", "REPLICA": "a", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = ["bash", ROOT / "examples/launch/torchft.sh", "--steps", "7"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900, check=True)
    started = "http://host:29510 examples/live.py --replica a --steps 7"
    assert done.stdout.splitlines() == [started, started] and "ended with 1" in done.stderr
    assert all(f'"{option}"' in (ROOT / "examples/live.py").read_text() for option in ("--replica", "--steps"))


def test_two_nodes_are_two_replicas(tmp_path):
    """Both nodes are this machine, with two ranks each."""
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 1000)
    options = f"--framework ddp --data {tmp_path}/text.txt --steps 3 --dim 32 --layers 1 --heads 1 --context 32".split()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "HEAD": "localhost",
        "PORT": str(port),
        "RANKS": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    nodes = [
        subprocess.Popen(
            ["bash", ROOT / "examples/launch/torchrun.sh", *options],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    try:
        printed = "".join(node.communicate(timeout=900)[0] for node in nodes)
    finally:
        for node in nodes:
            node.terminate()  # torchrun ends its ranks on the way out
            node.wait(timeout=60)
    assert "deslo: 2 replica(s) of 2 rank(s)" in printed and "ddp: 2 replicas of 2 ranks" in printed, printed[-2000:]
    assert [node.returncode for node in nodes] == [0, 0], printed[-2000:]
