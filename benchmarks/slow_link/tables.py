"""What a race on the cable says, for the screen and for benchmarks/results/."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from benchmarks.slow_link.contestants import CONTESTANTS, FLOORS
from benchmarks.slow_link.exposure import NODES, Row
from benchmarks.slow_link.network import MTU, WIRE_PER_PAYLOAD
from benchmarks.slow_link.race import SEQUENCES, SHAPE
from examples.harness.gpt import GPT, GPTConfig

SYNCHRONOUS = {1: "ddp", 2: "hsdp"}  # ranks per node -> what sends every gradient
SMALL = 0.02
WIDTH = 120
INSTALL = {"torchft": "torchft==0.2.0, into an environment to throw away", "accelerate": "accelerate"}
Results = Mapping[str, Sequence[Row]]
"""Rate -> rows."""


def shown(results: Results, period: int, shape: GPTConfig = SHAPE) -> Group:
    notes = Text("\n".join(_notes(results, period, shape)))
    return Group(*(_table(rate, rows) for rate, rows in results.items()), notes)


def save(results: Results, period: int, folder: Path, shape: GPTConfig = SHAPE, name: str = "link") -> None:
    """``name``.txt and ``name``.json in ``folder``, with the command and the kind of machine at their heads."""
    command = shlex.join(["python", "-m", "benchmarks.slow_link.link", *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.txt").open("w") as file:
        print(f"$ {command}\n# {machine}", file=file)
        Console(file=file, width=WIDTH).print(shown(results, period, shape))
    facts = {"command": command, "machine": machine, "model": asdict(shape), "sequences": SEQUENCES, "period": period}
    lines = {rate: ",\n".join(json.dumps(asdict(each)) for each in rows) for rate, rows in results.items()}
    rates = ",\n".join(f"{json.dumps(rate)}: [\n{rows}]" for rate, rows in lines.items())
    (folder / f"{name}.json").write_text(f'{json.dumps(facts)[:-1]}, "rates": {{\n{rates}}}}}\n')


def _table(rate: str, rows: Sequence[Row]) -> Table:
    headings = (
        "",
        "median\nstep, ms",
        "mean\nstep, ms",
        "exposed\nms",
        "exposed\n%",
        "waited\n%",
        "left by\nlink, %",
        "wire\nkB/step",
        "wire\n/ plan",
        "times less\nthan DDP",
    )
    grid = Table(*headings, title=f"{rate} between {NODES} nodes", title_justify="left")
    for column in grid.columns[1:]:
        column.justify = "right"
    by_name = {each.name: each for each in rows}
    for each in rows:
        contestant = CONTESTANTS[each.name]
        peer = by_name.get(SYNCHRONOUS[contestant.per_node])
        if each.name == FLOORS[contestant.per_node]:
            grid.add_section()
            grid.add_row(f"{NODES} x {contestant.per_node} rank{'s' * (contestant.per_node > 1)}", style="dim")
        grid.add_row(
            contestant.title,
            f"{each.step_ms:.1f}",
            f"{each.mean_ms:.1f}",
            f"{each.mean_ms - each.floor_ms:.2f}",
            f"{100 * each.exposed:.1f}",
            f"{100 * each.waited:.1f}" if contestant.ours else "-",
            "-" if each.inevitable is None else f"{100 * each.inevitable:.1f}",
            f"{each.bytes / 1e3:.1f}",
            f"{each.bytes / each.planned:.3f}" if each.planned else "-",
            f"{peer.bytes / each.bytes:.1f}" if peer and each.planned else "-",
            style="bold" if contestant.ours else None,
        )
    return grid


def _notes(results: Results, period: int, shape: GPTConfig) -> Iterator[str]:
    size = sum(param.numel() for param in GPT(shape).parameters())
    yield (
        f"A GPT of {size:,} float32 parameters, {SEQUENCES[1]} sequences of {shape.context} tokens for each node and "
        f"step ({2 * SEQUENCES[2]} where it has 2 ranks), K = {period}. Every rank computes on one thread; gloo's "
        "threads share the cores with it."
    )
    yield (
        "exposed: mean step above that without communication, over whole longest periods; the same again: how far two "
        "that do not communicate seem apart. waited: for averages, by the library's own meter. left by link: payload "
        "at the link's rate, less one step for each average that overlaps. All in shares of a step."
    )
    yield (
        "wire: bytes that a node sends, by its interface's counter; plan: bytes of the averages (or gradients) x 2 (M "
        f"- 1) / M, as a ring of M = {NODES} nodes has it, x {WIRE_PER_PAYLOAD:.4f} for Ethernet, IP and TCP headers "
        f"in frames of {MTU} bytes."
    )
    yield (
        "Local Adam and MT-DAO average three vectors every K steps; DES-LOC one every K, 3 K and 6 K; the other local "
        "methods one, the parameters, every K. In turn: overlap is off. In fragments: each state in as many as K, at "
        "steps of their own."
    )
    for rate, rows in results.items():
        by_name = {each.name: each for each in rows}
        lost = [
            f"{CONTESTANTS[name].title} exposes {by_name[name].exposed:.0%}"
            for name in SYNCHRONOUS.values()
            if name in by_name
        ]
        small = [
            CONTESTANTS[each.name].title
            for each in rows
            if CONTESTANTS[each.name].ours and max(each.exposed, each.waited) <= SMALL
        ]
        disturbed = sum(each.disturbed for each in rows) / len(rows)
        yield (
            f"{rate}: {', '.join(lost) or 'no peer'}. Of ours {'; '.join(small) or 'none'}: at most {SMALL:.0%} "
            f"exposed, and waited. Somebody else used the machine in {disturbed:.0%} of laps."
        )
    for module in sorted({each.needs for each in CONTESTANTS.values() if not each.installed}):
        absent = ", ".join(each.title for each in CONTESTANTS.values() if each.needs == module)
        yield f"Left out: {absent}; {module} is not installed here (pip install {INSTALL[module]})."
