"""What telemetry costs a step: written, not written, and not written once more, by turns in one run.

    python -m benchmarks.telemetry.cost

Two gloo processes of one thread each train the GPT of examples/, every rank a replica, DES-LOC with periods 32 / 96 /
192. A lap is 32 steps with one average; laps of the contestants take turns, in an order that turns round. The log of
every step is written too. Laps are compared by the clock, and by the CPU time of all threads of the process, the
writer's included, which others on the machine disturb less. Two contestants that write nothing say how far laps scatter
by themselves; and, since that is more than telemetry costs, its calls are also timed alone.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import deslo_plugin
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.kernels.drift import Drift
from deslo_plugin.telemetry.jsonl_writer import EVERY
from examples.harness.gpt import GPT, GPTConfig

SHAPE, SEQUENCES = GPTConfig(dim=96, layers=3, heads=3, context=128), 4
LAP, CALLS = 32, 20_000
CONTESTANTS = ("not written", "written", "not written again")


def contestant(folder: str | None) -> tuple[Callable[[], None], Any]:
    """(one step, the attachment) of a new model."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    deslo = {"replica_size": 1} | ({"telemetry": {"path": folder}} if folder else {})
    config = {"optimizer": {"params": {"sync_every": {"params": 32}}}, "deslo": deslo}
    optimizer = deslo_plugin.DesLoc(model.parameters(), config)
    attachment = deslo_plugin.attach(model, optimizer)
    tokens = torch.randint(256, (SEQUENCES, SHAPE.context))

    def step() -> None:
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attachment.log(loss=loss, tokens=tokens.numel())

    return step, attachment


def measure(rank: int, folder: str, laps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    made = {name: contestant(f"{folder}/run" if name == "written" else None) for name in CONTESTANTS}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    for lap in range(laps + 1):  # the first is thrown away
        for name in CONTESTANTS if lap % 2 else reversed(CONTESTANTS):
            dist.barrier()
            start, busy = time.perf_counter(), time.process_time()
            for _ in range(LAP):
                made[name][0]()
            seconds[name].append(((time.perf_counter() - start) / LAP, (time.process_time() - busy) / LAP))
    if rank == 0:
        report({name: each[1:] for name, each in seconds.items()}, *alone(made["written"][1]))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # what would follow is the end of gloo's threads, which aborts now and then


def alone(attachment: Any) -> tuple[float, float]:
    """CPU seconds of a log and of an event, by the thread that trains and the one that writes."""
    states = ("params", "exp_avg", "exp_avg_sq")
    found, flown = dict.fromkeys(states, Drift(0.1, 0.9)), dict.fromkeys(states, 0.02)
    event = SyncEvent(LAP, dict.fromkeys(states, 1428096), 1e-3, found, flown)
    loss, write = torch.tensor(1.5), attachment.averaging.listeners[-1]

    def cost(call: Callable[[], object]) -> float:
        start = time.process_time()
        for _ in range(CALLS):
            call()
        time.sleep(3 * EVERY)  # the writer writes all of it, and sleep is no CPU time
        return (time.process_time() - start) / CALLS

    return cost(lambda: attachment.log(loss=loss, tokens=512)), cost(lambda: write(event))


def report(seconds: dict[str, list[tuple[float, float]]], log: float, event: float) -> None:
    """``seconds``: of a step in each lap, by the clock and on CPUs."""
    base = seconds["not written"]
    step = statistics.median(busy for _, busy in base)
    table = Table(
        title=f"{len(base)} laps of {LAP} steps, 2 ranks, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for heading in ("contestant", "ms a step", "CPU ms", "clock, times not written", "quartiles", "CPU", "quartiles"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for name, each in seconds.items():
        cells = [name, *(f"{1e3 * statistics.median(of_kind):.2f}" for of_kind in zip(*each))]
        for mine, others in zip(zip(*each), zip(*base)):
            low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, others)], n=4)
            cells += [f"{middle:.4f}", f"{low:.3f} - {high:.3f}"]
        table.add_row(*cells)
    console = Console(width=120)
    console.print(f"$ python -m benchmarks.telemetry.cost --laps {len(base)}        (torch {torch.__version__})")
    console.print(table)
    share = 100 * (log + event / LAP) / step
    console.print(
        f"alone, CPU time of both threads: {1e6 * log:.1f} us for a log, {1e6 * event:.1f} us for an average of "
        f"three states; a log at every step and an average at every {LAP}nd are {share:.3f}% of a step"
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--laps", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        ranks = [context.Process(target=measure, args=(rank, folder, args.laps)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))


if __name__ == "__main__":
    main()
