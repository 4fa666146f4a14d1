"""The charts of a report: each draws runs side by side into axes that it is given."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from deslo_plugin.errors import ConfigError
from deslo_plugin.telemetry.report.run import Run

WIDTH, DPI = 11, 110  # inches, and dots in each
POINTS = 600  # of a line at most, each the mean of its neighbours
FLIGHTS = 20  # that a timeline shows: the last
FEW = 20  # values that are marked on their line: a single one has none
LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deslo",
    "font.size": 9,
    "legend.fontsize": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}
COLORS = tuple(f"C{number}" for number in range(10) if number != 3)  # of states; red is what was waited for
LONGEST = 32  # letters of a name beside a chart
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend hides nothing there
STYLES = ("-", "--", ":", "-.")  # of runs, where colours are states


@dataclass(frozen=True)
class Chart:
    """``draw`` takes one axes for each of the relative ``widths``; ``height`` in inches."""

    title: str
    draw: Callable[[Sequence[Any]], None]
    widths: Sequence[int]
    height: float

    def on(self, figure: Any) -> None:
        self.draw(figure.subplots(1, len(self.widths), width_ratios=self.widths))


def svgs(runs: Sequence[Run]) -> dict[str, str]:
    """Title -> an ``<svg>`` element, of all that the runs have told. Raises ``ConfigError`` without matplotlib."""
    figure_of, context = _matplotlib()
    drawn = {}
    with context:
        for chart in _charts(runs):
            figure = figure_of(figsize=(WIDTH, chart.height), layout="constrained")
            chart.on(figure)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            drawn[chart.title] = file.getvalue()[file.getvalue().index("<svg") :]
    return drawn


def png(runs: Sequence[Run], path: Path) -> None:
    """All charts in one picture. Raises ``ConfigError`` without matplotlib."""
    figure_of, context = _matplotlib()
    with context:
        charts = _charts(runs)
        heights = [chart.height + 0.3 for chart in charts]
        figure = figure_of(figsize=(WIDTH, sum(heights) or 1), layout="constrained")
        parts = figure.subfigures(len(charts), 1, height_ratios=heights, squeeze=False)[:, 0] if charts else []
        for part, chart in zip(parts, charts):
            part.suptitle(_text(chart.title), fontsize=10, fontweight="bold")
            chart.on(part)
        figure.savefig(path, format="png", dpi=DPI)


def _matplotlib() -> tuple[Any, Any]:
    """Its Figure, and a context in which charts look as ours do."""
    if find_spec("matplotlib") is None:
        raise ConfigError("deslo report", "matplotlib installed", "none", "pip install 'deslo-plugin[plot]'")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    return Figure, rc_context(LOOK)


def _charts(runs: Sequence[Run]) -> list[Chart]:
    """Those that would not be empty."""
    states = list(dict.fromkeys(state for run in runs for state in [*run.bytes, *run.drift]))
    color_of = {state: COLORS[number % len(COLORS)] for number, state in enumerate(states)}
    charts = []
    if any(run.losses for run in runs):
        charts.append(Chart("Loss by step, by token and by wall clock", partial(_losses, runs=runs), (1, 1, 1), 3.2))
    if any(run.bytes for run in runs):
        charts.append(
            Chart(
                "Bytes sent by a rank, and seconds waited for averages",
                partial(_costs, runs=runs, color_of=color_of),
                (1, 1),
                3.0,
            )
        )
    if any(run.drift for run in runs):
        charts.append(
            Chart(
                "Drift of the replicas from their average", partial(_drift, runs=runs, color_of=color_of), (1, 1), 3.4
            )
        )
    for run in runs:
        if run.flights:
            lanes = len({flight.state for flight in run.flights})
            charts.append(
                Chart(
                    f"{run.name}: averages on the first replica, from launch to landing; red: waited for",
                    partial(_timeline, run=run, color_of=color_of),
                    (3, 1),
                    0.9 + 0.35 * lanes,
                )
            )
    return charts


def _losses(axes: Sequence[Any], runs: Sequence[Run]) -> None:
    for axis, scale in zip(axes, ("steps", "tokens", "seconds")):
        for number, run in enumerate(runs):
            points = [point for point in run.losses if scale != "tokens" or point.tokens]
            axis.plot(
                _thin([getattr(point, scale) for point in points]),
                _thin([point.loss for point in points]),
                label=_name(run.name),
                color=f"C{number}",
                linewidth=1,
            )
        axis.set_xlabel(scale)
    axes[1].xaxis.set_major_formatter(_engineering())
    axes[0].set_ylabel("loss")
    axes[-1].legend(**BESIDE)


def _costs(axes: Sequence[Any], runs: Sequence[Run], color_of: dict[str, str]) -> None:
    bars, waits = axes
    left = [0.0] * len(runs)
    for state in [state for state in color_of if any(state in run.bytes for run in runs)]:
        widths = [run.bytes.get(state, 0) / 1e6 for run in runs]
        bars.barh(range(len(runs)), widths, left=left, color=color_of[state], label=_name(state))
        left = [a + b for a, b in zip(left, widths)]
    bars.set(xlabel="MB", yticks=range(len(runs)), yticklabels=[_name(run.name) for run in runs])
    bars.invert_yaxis()
    bars.legend(**BESIDE)
    for number, run in enumerate(runs):
        steps, seconds = zip((0, 0.0), *run.exposure)
        waits.step(steps, seconds, where="post", label=_name(run.name), color=f"C{number}")
    waits.set(xlabel="steps", ylabel="seconds, mean of the replicas", ylim=(0, None))
    waits.legend(**BESIDE)


def _drift(axes: Sequence[Any], runs: Sequence[Run], color_of: dict[str, str]) -> None:
    for number, run in enumerate(runs):
        for state, seen in run.drift.items():
            steps, label = (
                _thin([each.steps for each in seen]),
                f"{state}, {_short(run.name)}" if len(runs) > 1 else state,
            )
            for axis, values in zip(axes, ([each.distance for each in seen], [each.cosine for each in seen])):
                axis.plot(
                    steps,
                    _thin(values),
                    STYLES[number % len(STYLES)],
                    color=color_of[state],
                    label=_text(label),
                    linewidth=1,
                    marker="." if len(values) < FEW else None,
                )
    axes[0].set(xlabel="steps", ylabel="relative distance", yscale="log")
    axes[1].set(xlabel="steps", ylabel="cosine")
    axes[1].legend(**BESIDE)


def _timeline(axes: Sequence[Any], run: Run, color_of: dict[str, str]) -> None:
    """The last flights when they were, and the mean of all from its launch on."""
    last, mean = axes
    flights = run.flights
    lanes = [state for state in color_of if any(flight.state == state for flight in flights)]
    for flight in flights[-FLIGHTS:]:
        _bar(last, lanes.index(flight.state), flight.launch, flight.land, flight.exposed, color_of[flight.state])
    for lane, state in enumerate(lanes):
        own = [flight for flight in flights if flight.state == state]
        seconds, waited = fmean(each.land - each.launch for each in own), fmean(each.exposed for each in own)
        _bar(mean, lane, 0.0, seconds, waited, color_of[state])
    last.set(
        xlabel="seconds: the last of them",
        yticks=range(len(lanes)),
        yticklabels=list(map(_name, lanes)),
        ylim=(len(lanes) - 0.5, -0.5),
    )
    mean.set(
        xlabel="seconds since launch: mean", yticks=range(len(lanes)), yticklabels=[], ylim=(len(lanes) - 0.5, -0.5)
    )


def _bar(axis: Any, lane: int, launch: float, land: float, exposed: float, color: str) -> None:
    axis.barh(lane, land - launch, left=launch, height=0.6, color=color, edgecolor=color, linewidth=0.8)
    axis.barh(lane, exposed, left=land - exposed, height=0.6, color="red", linewidth=0)


def _name(text: str) -> str:
    return _text(_short(text))


def _short(text: str) -> str:
    """As it fits beside a chart."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


def _text(text: str) -> str:
    """As it is: matplotlib would set what stands between two $ as a formula, and leave out what begins with _."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter()


def _thin(values: Iterable[float]) -> list[float]:
    """At most ``POINTS`` values, means of neighbours."""
    values = list(values)
    size = -(-len(values) // POINTS)
    return [fmean(values[start : start + size]) for start in range(0, len(values), size or 1)]
