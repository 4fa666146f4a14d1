"""What a slow link between two nodes costs: DDP, FSDP2-HSDP and local methods against training without communication.

    python -m benchmarks.slow_link.link [--rates 100 500 1000 unshaped] [--period 32] [--only NAME ...] [--quick]

Two network namespaces are the nodes; a token bucket shapes the cable between them. Needs Linux, root and iproute2;
removes what it makes. How a cost is measured: ``exposure.py``. Writes benchmarks/results/link.json and link.txt.
"""

import signal
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.slow_link.contestants import CONTESTANTS, FLOORS
from benchmarks.slow_link.exposure import Row
from benchmarks.slow_link.network import Cable, NetworkError
from benchmarks.slow_link.race import SHAPE, Race, called, laps_of
from benchmarks.slow_link.ranks import RankError, World
from benchmarks.slow_link.tables import WIDTH, save, shown

RESULTS = Path(__file__).resolve().parents[1] / "results"

# seconds for each cycle, beside patience, after which a rank ends by itself whatever became of the rest
LIFETIME = 1500.0


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        results = measure(args)
    except (NetworkError, RankError) as error:
        sys.exit(f"link.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    Console(width=WIDTH).print(shown(results, args.period, args.shape))
    if not args.quick:
        name = "link" if args.shape == SHAPE else f"link-{args.width}x{args.layers}"
        save(results, args.period, RESULTS, args.shape, name)


def arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rates", type=rate, nargs="+", help='Mbit/s, or "unshaped"')
    parser.add_argument(
        "--period", type=int, help="K: steps between averages of parameters, a multiple of 4; 32 by default"
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=", ".join(CONTESTANTS))
    parser.add_argument("--cycles", type=int, default=1, help="longest periods (6 K steps) at each rate")
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds to wait in all while others use the machine"
    )
    parser.add_argument("--width", type=int, default=SHAPE.dim, help="of the GPT; what is written is named by it")
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one rate, K = 8, nothing is written")
    args = parser.parse_args()
    args.shape = replace(SHAPE, dim=args.width, layers=args.layers)
    args.rates = args.rates or ([500.0] if args.quick else [100.0, 500.0, 1000.0, None])
    args.period = args.period or (8 if args.quick else 32)
    if args.period <= 0 or args.period % 4:
        parser.error(
            f"--period: expected a multiple of 4 (laps are half a period, and begin at a quarter), got {args.period}"
        )
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
    """Rate -> rows, in the order of ``CONTESTANTS``."""
    wanted = {*(args.only or CONTESTANTS), *FLOORS.values()}
    chosen = {name: each for name, each in CONTESTANTS.items() if name in wanted and each.installed}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cable = stack.enter_context(Cable())
        lifetime = LIFETIME * args.cycles + args.patience
        worlds = {
            per_node: stack.enter_context(World(cable.nodes, per_node, logs, lifetime_s=lifetime))
            for per_node in FLOORS
        }
        total = len(chosen) + len(args.rates) * args.cycles * sum(map(laps_of, chosen.values()))
        advance = stack.enter_context(progress(total))
        race = Race(chosen, args.period, cable, worlds, advance, args.patience, args.cycles, args.shape)
        race.build()
        return {called(mbit): race.run(mbit) for mbit in args.rates}


@contextmanager
def progress(total: int) -> Iterator:
    """Gives a function that says what is done next: on a bar, or each new stage on a line where there is no terminal.

    It draws only when called: the ranks need every core.
    """
    columns = (
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("done,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.description}"),
    )
    console, stages = Console(stderr=True), set()
    with Progress(*columns, auto_refresh=False, transient=True, console=console) as bar:
        task = bar.add_task("", total=total)

        def advance(stage: str, what: str, by: int = 1) -> None:
            if not console.is_terminal and stage not in stages:
                print(stage, file=sys.stderr, flush=True)
            stages.add(stage)
            bar.update(task, advance=by, description=f"{stage}: {what}", refresh=True)

        yield advance


if __name__ == "__main__":
    main()
