"""Time to a loss on a slow link: methods of the study, each at its best rate, as processes on two nodes.

    python -m benchmarks.quality.clock [--rates 100 500]      # a quarter of an hour on two cores, which it wants for
    itself

Two network namespaces are the nodes, with two replicas each; a token bucket shapes the cable between them. Contestants
take turns, look by look, and validation is off the clock. Looks are half a period away from averages, so that none
travels while the clock stands. Needs Linux, root and iproute2. Writes benchmarks/results/clock.json and
docs/figures/clock.png."""

import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.quality.choice import at_best_rate
from benchmarks.quality.findings import markdown
from benchmarks.quality.ledger import Ledger, commit
from benchmarks.quality.methods import PRESETS, SYNCHRONOUS, Preset, Run
from benchmarks.quality.plots import clock_figure
from benchmarks.quality.study import FIGURES, results
from benchmarks.slow_link.network import Cable, NetworkError
from benchmarks.slow_link.others import Others
from benchmarks.slow_link.ranks import RankError, World

BENCHMARKS = Path(__file__).resolve().parents[1]

RESULTS = BENCHMARKS / "results" / "clock.json"
PER_NODE = 2
ENTRANTS = {  # title -> how it is built, and whose run it is in the study: the same update at the same rate
    "DDP": ("ddp", "synchronous AdamW"),
    "Accelerate LocalSGD": ("accelerate", "FAVG+OPT"),
    "torch PostLocalSGD": ("post-local-sgd", "FAVG+OPT"),
    "Local Adam": ("ours", "Local Adam"),
    "DES-LOC": ("ours", "DES-LOC"),
    "DES-LOC-QH": ("ours", "DES-LOC-QH"),
    "MT-DAO, two momenta": ("ours", "MT-DAO, two momenta"),
}
Entrants = Mapping[str, tuple[str, Run]]
Curve = dict[str, list[float]]
"""``steps``, ``seconds`` of training until then, ``waited`` of these by its own meter, ``losses`` there, nats per
byte."""


def entrants(preset: Preset, ledger: Ledger) -> Entrants:
    """With the best rates of the study, on its first seed."""
    chosen = at_best_rate(preset, ledger)
    return {title: (how, chosen[name, name not in SYNCHRONOUS][0]) for title, (how, name) in ENTRANTS.items()}


def race(world: World, preset: Preset, running: Entrants, progress: Progress, title: str) -> dict[str, Curve]:
    """Trains all to the end, in turns from look to look."""
    world.ask("start", preset, dict(running))
    curves: dict[str, Curve] = {name: {"steps": [], "seconds": [], "waited": [], "losses": []} for name in running}
    task = progress.add_task(title, total=preset.steps * len(running))
    done = 0
    for look in looks(preset):
        for name in random.sample(list(running), len(running)):
            times = world.ask("advance", name, look - done, timeout=600)
            curve = curves[name]
            curve["steps"].append(look)
            for key, seconds in zip(
                ("seconds", "waited"), (max(each[0] for each in times), statistics.mean(each[1] for each in times))
            ):
                curve[key].append(round(seconds + (curve[key] or [0.0])[-1], 3))
            curve["losses"].append(round(world.ask("loss", name)[0], 4))
            progress.advance(task, look - done)
        done = look
    return curves


def looks(preset: Preset) -> Iterator[int]:
    yield from range(preset.period // 2, preset.steps, preset.look)
    yield preset.steps


def reached(target: float, curve: Curve) -> tuple[float, float] | None:
    """(steps, seconds) after which ``curve`` is first at ``target``, linear between looks; None if it never is."""
    points = list(zip(curve["losses"], curve["steps"], curve["seconds"]))
    for (high, *before), (low, *after) in zip(points, points[1:]):
        if low <= target:
            share = (high - target) / (high - low)
            return tuple(early + share * (late - early) for early, late in zip(before, after))
    return None


def table(curves: Mapping[str, Mapping[str, Curve]], target: float) -> str:
    """Steps and seconds to ``target`` by rate, and the share of DDP's."""
    rows = []
    for name in next(iter(curves.values())):
        cells = []
        for rate in curves:
            at, ddp = (reached(target, curves[rate][each]) for each in (name, "DDP"))
            ms = 1e3 * curves[rate][name]["seconds"][-1] / curves[rate][name]["steps"][-1]
            cells += [f"{ms:.1f}", f"{at[1]:.1f}" if at else "never", f"{at[1] / ddp[1]:.2f}" if at and ddp else ""]
        first = next(iter(curves.values()))[name]
        steps = reached(target, first)
        rows.append([name, f"{first['losses'][-1]:.3f}", f"{steps[0]:.0f}" if steps else "never", *cells])
    columns = [heading for rate in curves for heading in (f"{rate}: ms a step", "s", "of DDP's")]
    return markdown([f"to {target:.3f} nats", "at the end, nats", "steps", *columns], rows)


def targets(curves: Mapping[str, Mapping[str, Curve]]) -> Sequence[float]:
    """What the slowest of all, and DES-LOC, end at."""
    ends = {name: curve["losses"][-1] for name, curve in next(iter(curves.values())).items()}
    return max(ends.values()), ends["DES-LOC"]


def tables(kept: Mapping[str, Any]) -> list[str]:
    return [table(kept["rates"], target) for target in targets(kept["rates"])]


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 500.0], help="Mbit/s (100 and 500)")
    parser.add_argument("--preset", choices=PRESETS, default="long", help="study whose runs these are (%(default)s)")
    parser.add_argument("--steps", type=int, help="a smoke test of so many steps; nothing is written")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    running = entrants(preset, Ledger(results(args.preset), preset))
    if args.steps:
        preset = replace(preset, steps=args.steps)
    curves, console = {}, Console(stderr=True)
    try:
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            cable = stack.enter_context(Cable())
            for mbit in args.rates:
                cable.shape(mbit)
                with (
                    World(
                        cable.nodes, PER_NODE, logs, lifetime_s=3600, module="benchmarks.quality.clock_rank"
                    ) as world,
                    Progress(console=console, refresh_per_second=0.2) as progress,
                ):
                    others = Others(world.pids, 0.0)
                    curves[f"{mbit:g} Mbit/s"] = race(world, preset, running, progress, f"{mbit:g} Mbit/s")
                    console.print(f"{mbit:g} Mbit/s: somebody else used {others.share():.0%} of the machine")
    except (NetworkError, RankError) as error:
        sys.exit(f"clock.py: {error}")
    kept = {
        "command": shlex.join(["python", "-m", "benchmarks.quality.clock", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}",
        "rates": curves,
    }
    if not args.steps:
        lines = json.dumps(kept, indent=None).replace('}, "', '},\n"').replace('{"DDP"', '{\n"DDP"')
        RESULTS.write_text(f"{lines}\n")
        clock_figure(curves, FIGURES / "clock.png")
    print("\n\n".join(tables(kept)))


if __name__ == "__main__":
    main()
