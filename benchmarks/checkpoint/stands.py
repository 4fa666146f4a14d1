"""How long training stands for a save that waits, and for one that writes behind training, by turns in one run.

    python -m benchmarks.checkpoint.stands [--device cuda --dim 512 --layers 6]

Two gloo processes of one thread each train the GPT of examples/, every rank a replica. A lap is a save and the steps
after it, which the background has to itself but for training; the next lap begins when the files are there. ``stands``
is the time of the call of save, during which no step is made. ``behind`` is what the steps of the lap took beyond as
many undisturbed ones: on a machine without a spare core the writer takes its time from them. ``files`` is the time from
the call until the checkpoint is in its place. ``first`` is the call of the first save, which also takes the memory that
later ones find. On a GPU both processes share it, and a save copies into pinned memory.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import deslo_plugin
from examples.harness.gpt import GPT, GPTConfig

CONTEXT, SEQUENCES, STEPS = 64, 1, 16
MODES = ("averaged", "per_replica")
Lap = tuple[float, float, float]


def training(shape: GPTConfig, device: str) -> tuple[Any, Callable[[], None]]:
    """(the attached model, one step)."""
    torch.manual_seed(0)
    model = GPT(shape).to(device)
    config = {"optimizer": {"params": {"sync_every": {"params": 10**6}}}, "deslo": {"replica_size": 1}}
    optimizer = deslo_plugin.DesLoc(model.parameters(), config)
    deslo_plugin.attach(model, optimizer)
    tokens = torch.randint(256, (SEQUENCES, shape.context), device=device)

    def step() -> None:
        model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return model, step


def lap(folder: Path, model: Any, step: Callable[[], None], mode: str, wait: bool) -> Lap:
    """Seconds that the save stood, that it and the steps after it took, and until its files were there."""
    dist.barrier()
    start = time.perf_counter()
    pending = deslo_plugin.save(folder / mode, model, mode=mode, wait=wait)
    stood = there = time.perf_counter() - start
    for _ in range(STEPS):
        step()
        if pending is not None and not pending.done():
            there = time.perf_counter() - start
    took = time.perf_counter() - start
    if pending is not None and not pending.done():
        pending.wait()
        there = time.perf_counter() - start
    return stood, took, there


def measure(rank: int, folder: str, laps: int, shape: GPTConfig, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, step = training(shape, device)
    found: dict[tuple[str, bool], list[Lap]] = {(mode, wait): [] for mode in MODES for wait in (True, False)}
    undisturbed: list[float] = []
    for number in range(laps + 1):  # the first counts apart
        for mode, wait in found if number % 2 else reversed(found):
            found[mode, wait].append(lap(Path(folder), model, step, mode, wait))
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            undisturbed.append(time.perf_counter() - start)
    if rank == 0:
        megabytes = 3 * sum(param.nbytes for param in model.parameters()) / 1e6
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        report(found, statistics.median(undisturbed), f"{megabytes:.0f} MB of state a rank, {where}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # what would follow is the end of gloo's threads, which aborts now and then


def report(found: dict[tuple[str, bool], list[Lap]], undisturbed: float, what: str) -> None:
    laps = len(next(iter(found.values()))) - 1
    table = Table(
        "mode", "save", "first, s", "stands, s", "quartiles", "behind, s", "files, s", "stands, times that of waiting",
        title=f"{laps} laps, {what}, {STEPS} steps of {undisturbed / STEPS * 1e3:.0f} ms; "
        f"2 ranks, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}",
    )  # fmt: skip
    later = {key: each[1:] for key, each in found.items()}
    for (mode, wait), each in later.items():
        stood, took, there = zip(*each)
        low, middle, high = statistics.quantiles(stood, n=4)
        ratios = [own[0] / waited[0] for own, waited in zip(each, later[mode, True])]
        table.add_row(
            mode,
            "waits" if wait else "wait=False",
            f"{found[mode, wait][0][0]:.3f}",
            f"{middle:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{statistics.median(all_ - own - undisturbed for all_, own in zip(took, stood)):.3f}",
            f"{statistics.median(there):.3f}",
            f"{statistics.median(ratios):.3f}",
        )
    Console(width=140).print(table)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--laps", type=int, default=10, help="laps of each kind of save (default: 10)")
    parser.add_argument("--folder", help="where to save, by default the system's temporary folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dim", type=int, default=384, help="width of the model (default: 384)")
    parser.add_argument("--layers", type=int, default=8, help="its layers (default: 8)")
    given = parser.parse_args()
    shape = GPTConfig(dim=given.dim, layers=given.layers, heads=max(1, given.dim // 64), context=CONTEXT)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        torch.multiprocessing.spawn(measure, args=(folder, given.laps, shape, given.device), nprocs=2)


if __name__ == "__main__":
    main()
