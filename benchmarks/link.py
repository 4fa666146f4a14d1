"""What a slow link between two nodes costs: DDP, FSDP2-HSDP and local methods against training without communication.

    python benchmarks/link.py [--rates 100 400 1000 unshaped] [--period 32] [--quick]

Two network namespaces are the nodes; a token bucket shapes the cable between them. Needs Linux, root and iproute2; removes
what it makes. How a cost is measured: ``exposure.py``. Writes benchmarks/results/link.json and link.txt.
"""

import json
import os
import platform
import random
import shlex
import signal
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "examples"))

import exposure
import torch
from contestants import CONTESTANTS, FLOORS, Contestant, Setting
from exposure import NODES, Lap, Row
from gpt import GPT, GPTConfig
from network import MTU, WIRE_PER_PAYLOAD, Cable, NetworkError
from others import QUIET, Others
from ranks import RankError, World
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

RESULTS = HERE / "results"
WIDTH = 112
SHAPE = GPTConfig(dim=128, layers=3, context=160)
SEQUENCES = 4  # of each node and step
ROUNDS = 12  # laps in a whole longest period: 6 K steps in halves of K
SOME = 4  # laps of those whose costs are large: 2 K steps, or K of those that communicate at every step
CYCLES = 3  # at most, of contestants that somebody else disturbed
LIFETIME = 1500.0  # seconds after which a rank ends by itself, whatever became of the rest
HOW_TO_INSTALL = {"torchft": " (it pins much: pip install torchft==0.2.0 into an environment to throw away)"}


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        tables = measure(args)
    except (NetworkError, RankError) as error:
        sys.exit(f"link.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    report(args, tables)


def arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rates", type=rate, nargs="+", help='Mbit/s, or "unshaped"')
    parser.add_argument("--period", type=int, help="K: steps between averages of parameters, a multiple of 4")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=", ".join(CONTESTANTS))
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait in all while others use the machine")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one rate, K = 8, nothing is written")
    args = parser.parse_args()
    args.rates = args.rates or ([400.0] if args.quick else [100.0, 400.0, 1000.0, None])
    args.period = args.period or (8 if args.quick else 32)
    if args.period % 4:
        parser.error(f"--period: expected a multiple of 4 (laps are half a period, and begin at a quarter), got {args.period}")
    return args


def rate(text: str) -> float | None:
    try:
        value = None if text == "unshaped" else float(text)
    except ValueError:
        value = 0.0
    if value is not None and value <= 0:
        raise ArgumentTypeError(f'expected Mbit/s or "unshaped", got {text!r}')
    return value


def measure(args: Namespace) -> dict[str, list[Row]]:
    """Rate -> rows."""
    names = [name for name in CONTESTANTS if name in FLOORS.values() or not args.only or name in args.only]
    chosen = {name: CONTESTANTS[name] for name in names if CONTESTANTS[name].installed}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cable = stack.enter_context(Cable())
        worlds = {per_node: stack.enter_context(World(cable.nodes, per_node, logs, lifetime_s=LIFETIME)) for per_node in FLOORS}
        total = len(chosen) + len(args.rates) * sum(map(share, chosen.values()))
        race = Race(chosen, args.period, cable, worlds, stack.enter_context(progress(total)), args.patience)
        race.build()
        return {label(mbit): race.run(mbit) for mbit in args.rates}


class Race:
    """Contestants that take turns on one cable."""

    def __init__(
        self, contestants: Mapping[str, Contestant], period: int, cable: Cable, worlds: Mapping[int, World],
        advance: Callable[..., None], patience_s: float,
    ):
        self.contestants, self.period, self.cable, self.worlds, self.advance = contestants, period, cable, worlds, advance
        self.others = Others((pid for world in worlds.values() for pid in world.pids), patience_s)
        self.busy = 1.0

    def build(self) -> None:
        for name, contestant in self.contestants.items():
            self.advance("building", contestant.title)
            setting = Setting(SHAPE, SEQUENCES // contestant.per_node, self.period)
            self.worlds[contestant.per_node].ask("build", name, setting, self.period // 4)

    def run(self, mbit: float | None) -> list[Row]:
        """A whole longest period of each, and again of those whom somebody else disturbed, while patience lasts."""
        self.cable.shape(mbit)
        self.laps: dict[str, list[Lap]] = {name: [] for name in self.contestants}
        unsettled, cycles = set(self.contestants), 0
        while unsettled and (cycles == 0 or self.others.patience_s > 0 and cycles < CYCLES):
            for index in range(ROUNDS):
                turn = [name for name in unsettled if index * share(self.contestants[name]) % ROUNDS < share(self.contestants[name])]
                for name in random.sample(turn, len(turn)):
                    self.advance(label(mbit), self.contestants[name].title, by=cycles == 0)
                    self.laps[name].append(self._lap(name, cycles * ROUNDS + index))
            cycles += 1
            unsettled = {name for name in self.contestants if exposure.unsettled(self.laps[name], self._floor(name))}
            unsettled |= {FLOORS[self.contestants[name].per_node] for name in unsettled}
        return [
            exposure.row(name, self.laps[name], self._floor(name), hides=each.hides, mbit=mbit)
            for name, each in self.contestants.items()
        ]

    def _floor(self, name: str) -> list[Lap]:
        return self.laps[FLOORS[self.contestants[name].per_node]]

    def _lap(self, name: str, index: int) -> Lap:
        contestant = self.contestants[name]
        steps = self.period // (2 if contestant.longest else 4)
        if self.busy > QUIET:
            self.others.wait()
        self.others.share()
        before = self.cable.sent()
        segments = self.worlds[contestant.per_node].ask("run", name, steps)
        sent = [after - earlier for earlier, after in zip(before, self.cable.sent())]
        self.busy = self.others.share()
        return exposure.lap(index, segments, sent, self.busy)


def share(contestant: Contestant) -> int:
    """Of ``ROUNDS`` rounds, in how many it takes part: a whole number of its longest periods."""
    if contestant.longest > 1 or contestant.silent:
        return ROUNDS
    return ROUNDS // 2 if contestant.ours else SOME


def label(mbit: float | None) -> str:
    return "unshaped" if mbit is None else f"{mbit:g} Mbit/s"


@contextmanager
def progress(total: int) -> Iterator:
    """Gives a function that says what is done next: on a bar, or each new stage in a line where there is no terminal.
    Draws only when called: the ranks need every core."""
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("of about"), TimeRemainingColumn(elapsed_when_finished=True),
               TextColumn("{task.description}"))
    console, stages = Console(stderr=True), set()
    with Progress(*columns, auto_refresh=False, transient=True, console=console) as bar:
        task = bar.add_task("starting", total=total)

        def advance(stage: str, what: str, by: int = 1) -> None:
            if not console.is_terminal and stage not in stages:
                print(stage, file=sys.stderr, flush=True)
            stages.add(stage)
            bar.update(task, advance=by, description=f"{stage}: {what}", refresh=True)

        yield advance


def report(args: Namespace, tables: dict[str, list[Row]]) -> None:
    command = shlex.join(["python", "benchmarks/link.py", *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    shown = Group(*(table(name, rows) for name, rows in tables.items()), Text(notes(args, tables)))
    Console(width=WIDTH).print(shown)
    if args.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "link.txt").open("w") as file:
        print(f"$ {command}\n# {machine}", file=file)
        Console(file=file, width=WIDTH).print(shown)
    facts = {"command": command, "machine": machine, "model": asdict(SHAPE), "sequences": SEQUENCES, "period": args.period}
    lines = [f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(asdict(each)) for each in rows) + "]" for name, rows in tables.items()]
    (RESULTS / "link.json").write_text(f"{json.dumps(facts)[:-1]}, \"rates\": {{\n" + ",\n".join(lines) + "}}\n")


def table(name: str, rows: list[Row]) -> Table:
    grid = Table("", "median\nstep, ms", "mean\nstep, ms", "exposed\nms", "exposed\n%", "link's\nshare, %", "wire\nkB/step",
                 "wire\n/ plan", "DDP's wire\n/ its own", title=f"{name} between {NODES} nodes")
    for column in grid.columns[1:]:
        column.justify = "right"
    synchronous = {1: "ddp", 2: "hsdp"}
    by_name = {each.name: each for each in rows}
    for each in rows:
        contestant = CONTESTANTS[each.name]
        peer = by_name.get(synchronous[contestant.per_node])
        if each.name in FLOORS.values():
            grid.add_section()
            grid.add_row(f"[dim]{NODES} x {contestant.per_node} ranks")
        grid.add_row(
            contestant.title, f"{each.step_ms:.1f}", f"{each.mean_ms:.1f}", f"{each.mean_ms - each.floor_ms:.2f}",
            f"{each.exposed:.1%}"[:-1], "-" if each.inevitable is None else f"{each.inevitable:.1%}"[:-1],
            f"{each.bytes / 1e3:.1f}", f"{each.bytes / each.planned:.3f}" if each.planned else "-",
            f"{peer.bytes / each.bytes:.1f}" if peer and each.planned else "-", style="bold" if contestant.ours else None,
        )
    return grid


def notes(args: Namespace, tables: dict[str, list[Row]]) -> str:
    lines = [
        f"A GPT of {sum(p.numel() for p in GPT(SHAPE).parameters()):,} float32 parameters, {SEQUENCES} sequences of "
        f"{SHAPE.context} tokens for each node and step, K = {args.period}; every rank has one thread.",
        "exposed: mean step beyond that of no communication, over whole longest periods. link's share: what of it is left when "
        "payload at the link's rate is hidden under one step (overlap), or not at all. wire: bytes sent by a node, by its "
        "interface's counter; plan: bytes of the averages or gradients x 2 (M - 1) / M of a ring of M = 2 nodes x "
        f"{WIRE_PER_PAYLOAD:.4f} for Ethernet, IP and TCP headers in frames of {MTU} bytes.",
        "Local Adam and MT-DAO average three vectors each K steps, DES-LOC one each K, 3 K and 6 K, the other local methods one "
        "each K.",
    ]
    for name, rows in tables.items():
        exposed = {each.name: each.exposed for each in rows}
        small = [CONTESTANTS[each].title for each, value in exposed.items() if value <= 0.02 and CONTESTANTS[each].ours]
        lost = ", ".join(f"{CONTESTANTS[each].title} {exposed[each]:.0%}" for each in ("ddp", "hsdp") if each in exposed)
        lines.append(f"{name}: exposed {lost or '-'}; ours at most 2%: {', '.join(small) or 'none'}.")
    for module in sorted({each.needs for each in CONTESTANTS.values() if not each.installed}):
        absent = ", ".join(each.title for each in CONTESTANTS.values() if each.needs == module)
        lines.append(f"Left out: {absent}; {module} is not installed here{HOW_TO_INSTALL.get(module, '')}.")
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    main()
