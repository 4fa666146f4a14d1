"""The share of the time that computes over bandwidth, one line for each method, for one's own job."""

from pathlib import Path

from deslo_plugin.cli.figures import expect_drawable
from deslo_plugin.cli.plan_report import SWEEP, PlanReport
from deslo_plugin.planning.comparison import IN_TURN

POINTS = 61


def draw(outlook: PlanReport, path: Path) -> None:
    """Writes the figure. Raises ``ConfigError`` where it cannot be written."""
    expect_drawable(path)
    from matplotlib.figure import Figure

    job, low, high = outlook.job, SWEEP[0], SWEEP[-1]
    rates = [low * (high / low) ** (index / (POINTS - 1)) for index in range(POINTS)]
    hours = [outlook.hours(rate) for rate in rates]
    computed = job.steps * job.step_s / 3600
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in (each for each in hours[0] if each != IN_TURN):
        axes.plot(
            rates,
            [100 * computed / each[name] for each in hours],
            label=name,
            linestyle="--" if name.startswith("synchronous") else "-",
        )
    axes.axvline(outlook.link.gbit_per_s, color="grey", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="Gbit/s between replicas",
        ylabel="% of the time spent computing",
        ylim=(0, 101),
        title=f"{job.numel:.3g} parameters, {job.replicas} replicas, {job.step_s * 1e3:.4g} ms a step",
    )
    axes.legend(fontsize="small")
    figure.savefig(path)
