"""The command line of examples/train.py: launches and compares runs, or is one rank of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import psutil
from rich.console import Console

from .report import Result, table

ADAMW = {  # the baseline's optimizer: what one would use at this size without the package
    "type": "AdamW",
    "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True},
}

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
FRAMEWORKS = ("deepspeed", "ddp", "fsdp", "accelerate", "torch")
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def size(text: str) -> int | str:
    """A --replica-size: a number of ranks, or "auto"."""
    return text if text == "auto" else int(text)


def arguments(given: Sequence[str] | None = None) -> Namespace:
    """The command line, or `given` in place of it, checked as far as one process can."""
    parser = ArgumentParser(
        prog=SCRIPT.name, description="Train with desynchronised replicas, and once more synchronously, and compare."
    )
    parser.add_argument("--config", type=Path, required=True, help='DeepSpeed JSON with a "deslo" block')
    parser.add_argument("--baseline", action=BooleanOptionalAction, default=True, help="also train synchronously")
    parser.add_argument("--data", type=Path, help="text file or folder (default: Python's own standard library)")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps (%(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="ranks on this machine (%(default)s)")
    parser.add_argument(
        "--framework",
        choices=FRAMEWORKS,
        default="deepspeed",
        help="%(choices)s; torch is no wrapper, each rank a replica",
    )
    parser.add_argument(
        "--replica-size", type=size, help='ranks per replica, in place of the JSON\'s; "auto" is the ranks of a node'
    )
    parser.add_argument("--zero-stage", type=int, choices=range(4), help="ZeRO stage, in place of the JSON's")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data (%(default)s)")
    parser.add_argument("--dim", type=int, default=96, help="model width (%(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=128, help="bytes per window (%(default)s)")
    parser.add_argument("--result", type=Path, help="write the results to this JSON file")
    args = parser.parse_args(given)
    if not args.config.is_file():
        parser.error(f"--config: expected a DeepSpeed JSON, no file lies at {args.config}; see configs/")
    if args.data and not args.data.exists():
        parser.error(f"--data: expected a text file or a folder of them, nothing lies at {args.data}")
    for name in ("steps", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.framework != "deepspeed" and args.zero_stage is not None:
        parser.error(f"--zero-stage: expected --framework deepspeed, got {args.framework}; remove one of the two")
    if args.framework == "torch" and args.replica_size not in (None, 1):
        parser.error(f"--replica-size: expected 1 with --framework torch, got {args.replica_size}; take ddp for more")
    return args


def synchronous(config: dict[str, Any]) -> dict[str, Any]:
    """The same JSON for training with a gradient average at every step."""
    return {**{key: value for key, value in config.items() if key != "deslo"}, "optimizer": ADAMW}


def save(results: list[Result], path: Path) -> None:
    """Write results as JSON; `load` reads them."""
    path.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


def load(path: Path) -> list[Result]:
    """Results that `save` wrote."""
    return [Result(**result) for result in json.loads(path.read_text())]


def run(config: Path, options: list[str], processes: int, folder: Path) -> Result:
    """Train once with `config` in `processes` processes; no process is left, however this ends."""
    result = folder / f"{config.stem}.result.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*torchrun, SCRIPT, *options, "--config", config, "--result", result]
    # One thread per rank, unless told otherwise, as ranks share the cores. Their temporary files go with the folder.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": str(folder)}
    # A session of its own: Ctrl-C then reaches this process alone, and this process ends the others.
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = launcher.wait()
    finally:
        end(launcher)
    if code:
        sys.exit(f"{SCRIPT.name}: the run of {config.name} failed with exit code {code}; its errors are above")
    return load(result)[0]


def end(launcher: subprocess.Popen[bytes]) -> None:
    """Kill the launcher, if it still runs, and its ranks, which have sessions of their own."""
    if launcher.poll() is None:
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        for process in (launcher, *ranks):
            process.kill()
        launcher.wait()
        psutil.wait_procs(ranks)


def compare(args: Namespace) -> None:
    """Launch every run, one after the other, and print the table."""
    try:
        config = json.loads(args.config.read_text())
    except json.JSONDecodeError as error:
        sys.exit(f"{args.config}: expected JSON; {error}")
    if "deslo" not in config:
        sys.exit(f'{args.config}: expected a "deslo" block (the baseline is made from it); see configs/')
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Options go on as they were given: of one given twice the last counts.
        console.rule(args.config.stem, align="left")
        results = [run(args.config, sys.argv[1:], args.processes, folder)]
        if args.baseline:
            baseline = folder / "synchronous-adamw.json"
            baseline.write_text(json.dumps(synchronous(config)))
            console.rule(baseline.stem, align="left")
            size = str(results[0].replica_size)
            results.append(run(baseline, [*sys.argv[1:], "--replica-size", size], args.processes, folder))
    from .links import on_links  # imports torch, which no other part of this process needs

    console.print(table(results, on_links(results, config, args.steps)))
    if args.result:
        save(results, args.result)


def work(args: Namespace) -> None:
    """Be one rank of one run."""
    import torch

    from .worker import train

    result = train(args)
    if int(os.environ["RANK"]) == 0:
        if args.result:
            save([result], args.result)
        else:
            Console().print(table([result]))
    torch.distributed.barrier()
    # All is written. What would follow is the end of the libraries' own threads, which aborts now and then.
    sys.stdout.flush()
    os._exit(0)


def stop(number: int, _: object) -> NoReturn:
    """Turn the first signal into an exception, so that whatever runs is ended on the way out."""
    for again in ENDINGS:
        signal.signal(again, signal.SIG_IGN)
    Console().show_cursor()  # a live bar hid it
    print(f"\nstopped by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


def main() -> None:
    options = arguments()
    if "RANK" in os.environ:
        work(options)
    else:
        for ending in ENDINGS:
            signal.signal(ending, stop)
        compare(options)
