"""``deslo simulate``: what algorithms do with many replicas, on problems that take seconds or minutes."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from deslo_plugin.cli.curves import draw
from deslo_plugin.cli.figures import expect_drawable
from deslo_plugin.cli.output import bytes_of, command, number, show, table
from deslo_plugin.errors import ConfigError
from deslo_plugin.simulation.comparison import Algorithm, Curve, follow, read_contestants
from deslo_plugin.simulation.momentum_memory import Memory, memory, proven
from deslo_plugin.simulation.run import SimulationStep
from deslo_plugin.simulation.run import simulate as moments_of
from deslo_plugin.simulation.settings import OPTIONS, SimulationConfig
from deslo_plugin.version import __version__

DEFAULT = ["des-loc-adam", "local-adam", "favg+opt"]
DEFAULTS = f"By default {', '.join(DEFAULT)}."
Results = Mapping[str, Sequence[Curve]]


@command
def simulate(
    config: Annotated[
        list[str] | None, typer.Option(help="File, or name in configs/; several compare. " + DEFAULTS)
    ] = None,
    objective: Annotated[
        str, typer.Option(help=", ".join(OPTIONS) + ", which is a small language model.")
    ] = "rosenbrock",
    replicas: Annotated[int, typer.Option(help="How many start.")] = 16,
    steps: Annotated[int, typer.Option(help="Of each run.")] = 1000,
    seed: Annotated[list[int] | None, typer.Option(help="Of noise, data, failures (0); several make a band.")] = None,
    lr: Annotated[float | None, typer.Option(help="In place of every config's.")] = None,
    synchronous: Annotated[
        bool, typer.Option("--synchronous", help="Add synchronous training with the first config.")
    ] = False,
    noniid: Annotated[
        float, typer.Option(help="How much replicas differ, see docs/simulate.md; 0 is not at all.")
    ] = 0.0,
    sigma: Annotated[
        float | None, typer.Option(help="Deviation of the gradient noise (rosenbrock 1.5, quadratic 1).")
    ] = None,
    spectrum: Annotated[str | None, typer.Option(help="Of quadratic, logistic: 1,0.5,0.1 or low:high:count.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text for bytes; by default Python's own modules.")] = None,
    double_at: Annotated[int | None, typer.Option(help="Steps after which as many replicas join.")] = None,
    fail_every: Annotated[int | None, typer.Option(help="After every so many steps some replicas fail,")] = None,
    fail_share: Annotated[float | None, typer.Option(help="this share of them (0.05, at least one),")] = None,
    fail_absent: Annotated[
        int | None, typer.Option(help="and are away for so many steps at least (as --fail-every).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="By default the GPU, if there is one.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw losses over steps into this file: .png, .svg or .pdf.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write settings and curves to this file; - prints.")
    ] = None,
) -> None:
    """Trains replicas in one process, with the optimizer that trains across nodes, and compares algorithms."""
    scene = SimulationConfig(
        objective=objective,
        replicas=replicas,
        steps=steps,
        sigma=sigma,
        spectrum=spectrum,
        data=data,
        noniid=noniid,
        double_at=double_at,
        fail_every=fail_every,
        fail_share=fail_share,
        fail_absent=fail_absent,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    contestants = read_contestants(config or DEFAULT, lr=lr, synchronous_steps=steps if synchronous else None)
    seeds = [0] if seed is None else seed
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError("--seed", "different whole numbers >= 0", ", ".join(map(str, seeds)), "correct them")
    if plot is not None:
        expect_drawable(plot)
    results = run(scene, contestants, seeds)
    if plot is not None:
        draw(scene, results, plot)
    if json_file is not None:
        text = json.dumps(as_dict(scene, contestants, results))
        typer.echo(text) if str(json_file) == "-" else json_file.write_text(text + "\n")
    if str(json_file) != "-":
        show(ends(scene, results), "", memories(scene, contestants), *proofs(scene, contestants))


def run(scene: SimulationConfig, contestants: Sequence[Algorithm], seeds: Sequence[int]) -> Results:
    """Every contestant with every seed, progress on stderr."""
    results: dict[str, list[Curve]] = {each.name: [] for each in contestants}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=scene.steps * len(contestants) * len(seeds))
        for at, (seed, each) in enumerate((seed, each) for seed in seeds for each in contestants):
            progress.update(task, description=f"{each.name}, seed {seed}", completed=at * scene.steps)
            goal = scene.build(seed)
            moments = moments_of(
                goal,
                each.config,
                replicas=scene.replicas,
                steps=scene.steps,
                membership=scene.membership(each.config, seed),
                rate=scene.rate,
                norm_clip=each.norm_clip,
            )
            results[each.name].append(follow(goal, ticking(moments, progress, task), every=scene.looks, seed=seed))
    return results


def ticking(moments: Iterable[SimulationStep], progress: Progress, task: TaskID) -> Iterator[SimulationStep]:
    """``moments``, and a bar that goes on with them."""
    for moment in moments:
        progress.advance(task)
        yield moment


def as_dict(scene: SimulationConfig, contestants: Sequence[Algorithm], results: Results) -> dict[str, Any]:
    """All that a figure needs, and what it takes to make it again."""
    return {
        "versions": {"deslo_plugin": __version__, "torch": torch.__version__},
        "scene": asdict(scene) | {"data": scene.data and str(scene.data)},
        "algorithms": {
            each.name: {
                "optimizer": asdict(each.config.desloc),
                "gradient_clipping": each.norm_clip,
                "memory": [row._asdict() for row in remembered(scene, each)],
                "curves": [asdict(curve) for curve in results[each.name]],
            }
            for each in contestants
        },
    }


def ends(scene: SimulationConfig, results: Results) -> Table:
    """Losses of the last tenth, and the bytes that they cost."""
    rows = []
    for name, curves in results.items():
        end = [curve.end for curve in curves]
        rows.append(
            [
                name,
                _loss(median(end)),
                f"{_loss(min(end))} to {_loss(max(end))}" if len(end) > 1 else "",
                _loss(median(max(curve.late) for curve in curves)),
                bytes_of(max(curve.bytes for curve in curves)),
            ]
        )
    title = f"{scene.objective}, {scene.replicas} replicas, {scene.steps:,} steps: "
    title += "loss at their mean, last tenth of the run"
    return table(title, ["", "median", "over seeds", "highest", "a replica sends"], rows)


def memories(scene: SimulationConfig, contestants: Sequence[Algorithm]) -> Table:
    """What is left of an average when the next one comes, by the papers' formulas."""
    rows = [
        [
            each.name,
            row.state,
            f"{row.beta:g}",
            number(row.half_life),
            "never" if row.period is None else str(row.period),
            f"{row.kept:.3g}",
            f"{row.drift:.3g}",
            "" if row.noise is None else f"{row.noise:.3g}",
            "" if row.information is None else f"{row.information:.3g}",
        ]
        for each in contestants
        for row in remembered(scene, each)
    ]
    columns = ["", "momentum", "beta", "half-life", "every", "kept", "drift <=", "local noise", "nats"]
    return table("What each momentum keeps of its average until the next", columns, rows, words=2)


def proofs(scene: SimulationConfig, contestants: Iterable[Algorithm]) -> list[str]:
    """The papers' psi and largest proven rate, for those of rule sgdm."""
    lines = []
    for each in contestants:
        if local(scene, each) and (found := proven(each.config.desloc)) is not None:
            rate = "" if found.rate is None else f", converges by proof at rates up to {found.rate:.3g} / L"
            lines.append(f"{each.name}: psi {found.psi:.4g}{rate}")
    return lines


def remembered(scene: SimulationConfig, contestant: Algorithm) -> list[Memory]:
    return memory(contestant.config.desloc, scene.replicas) if local(scene, contestant) else []


def local(scene: SimulationConfig, contestant: Algorithm) -> bool:
    """Whether replicas ever step by gradients of their own: else their momenta are one, and need no average."""
    return contestant.config.deslo.synchronous_steps < scene.steps


def _loss(value: float) -> str:
    return f"{value:.4g}" if value != float("inf") else "diverged"
