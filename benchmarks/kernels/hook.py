"""What DDP costs per step once its all-reduce is replaced: bare module, DDP with our hook, plain DDP, in one run.

    python -m benchmarks.kernels.hook

Two gloo processes of one thread each run the three contestants in turn, round after round; no average is due meanwhile.
Prints the median over rounds of each contestant's mean step, and its ratio to the bare module in the same round.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import deslo_plugin
from deslo_plugin.comm.transport import SingleReplica

WIDTH, LAYERS, BATCH = 1024, 4, 32
NEVER = 10**9


def contestants() -> dict[str, Callable[[], None]]:
    """Name -> one forward, backward and step of the same model."""
    config = {
        "optimizer": {"params": {"sync_every": dict.fromkeys(("params", "exp_avg", "exp_avg_sq"), NEVER)}},
        "deslo": {"replica_size": 1},
    }

    def steps(wrap: Callable[[nn.Module], nn.Module], ours: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model = wrap(nn.Sequential(*[layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]))
        optimizer = deslo_plugin.DesLoc(model.parameters(), config, transport=None if ours else SingleReplica())
        if ours:
            deslo_plugin.attach(model, optimizer)
        inputs = torch.randn(BATCH, WIDTH)

        def step() -> None:
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {
        "bare module": steps(lambda model: model, ours=False),
        "DDP, our hook": steps(DistributedDataParallel, ours=True),
        "DDP": steps(DistributedDataParallel, ours=False),
    }


def measure(rank: int, store: str, rounds: int, each: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    steps = contestants()
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds), "rounds", disable=rank != 0):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(each):
                step()
            times[name].append((time.perf_counter() - start) / each)
    if rank == 0:
        table = Table(
            "per step", "median ms", "times the bare module", title=f"{LAYERS} x {WIDTH}^2 float32, 2 ranks of 1 thread"
        )
        for name, own in times.items():
            ratio = statistics.median(mine / bare for mine, bare in zip(own, times["bare module"]))
            table.add_row(name, f"{1e3 * statistics.median(own):.1f}", f"{ratio:.2f}")
        Console().print(table)
    dist.barrier()
    os._exit(0)  # all is written; the end of the libraries' threads aborts now and then


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="steps of each contestant in a round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (f"{folder}/store", arguments.rounds, arguments.steps), nprocs=2)
