"""What the person at the screen sees: a line while a run trains, a table when the runs are over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Status:
    """A run after `step` steps: loss of rank 0 in nats, bytes so far by state, next average (in steps, of states)."""

    step: int
    loss: float
    tokens_per_second: float
    bytes: dict[str, int]
    next_sync: tuple[int, tuple[str, ...]] | None

    @property
    def learning(self) -> str:
        return f"loss {self.loss:.3f}  {self.tokens_per_second:,.0f} tokens/s"

    @property
    def talking(self) -> str:
        moved = "  ".join(f"{state} {human(count)}" for state, count in self.bytes.items()) or "nothing moved yet"
        if self.next_sync is None:
            return moved
        steps, states = self.next_sync
        return f"{moved}  next: {', '.join(states)} in {steps} step{'s' * (steps != 1)}"


@dataclass(frozen=True)
class Result:
    """A finished run. Bytes are one rank's; `seconds_exposed` is None where the averages were computed, not counted."""

    name: str
    framework: str
    replicas: int
    replica_size: int
    tokens: int
    loss: float
    bytes: dict[str, int]
    synchronous_bytes: int
    gradient_dtype: str
    seconds_exposed: float | None
    seconds: float


def human(count: float) -> str:
    """1234567 -> "1.23 MB": bytes in three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def display(steps: int) -> Iterator[Callable[[Status], None]]:
    """Gives a function that shows each status: a live bar on a terminal, else a plain line every tenth of the run."""
    if not sys.stdout.isatty():

        def line(status: Status) -> None:
            if status.step == steps or status.step % max(1, steps // 10) == 0:
                print(f"step {status.step}/{steps}  {status.learning}  {status.talking}", flush=True)

        yield line
        return

    bar = Progress(BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(), expand=True)
    task = bar.add_task("", total=steps)
    with Live(bar, console=Console(), refresh_per_second=5) as live:

        def redraw(status: Status) -> None:
            bar.update(task, completed=status.step)
            live.update(Group(bar, Text(status.learning), Text(status.talking)))

        yield redraw


def table(results: Sequence[Result], planned: Mapping[str, Sequence[str]] | None = None) -> Group:
    """One column per run, one row per quantity, and below it what the numbers do and do not say. ``planned``: label ->
    what each run would take, of other links."""
    states = dict.fromkeys(state for result in results for state in result.bytes)  # a set that keeps the order

    def row(cell: Callable[[Result], str]) -> list[str]:
        return [cell(result) for result in results]

    first = results[0]
    replicas = f"{first.replicas} replicas of {first.replica_size} rank{'s' * (first.replica_size != 1)}"
    grid = Table("", *row(lambda r: r.name), title=f"[bold]{first.framework}: {replicas}")
    for column in grid.columns[1:]:
        column.justify = "right"
    grid.add_row("validation loss, nats/byte", *row(lambda r: f"[bold]{r.loss:.4f}"))
    grid.add_row("tokens", *row(lambda r: f"{r.tokens:,}"), end_section=True)
    for state in states:
        grid.add_row(f"bytes: {state}", *row(lambda r: human(r.bytes[state]) if state in r.bytes else "-"))
    grid.add_row("bytes in total", *row(lambda r: human(sum(r.bytes.values()))))
    grid.add_row("times less than synchronous", *row(times_less), end_section=True)
    grid.add_row(
        "seconds waited for averages", *row(lambda r: "-" if r.seconds_exposed is None else f"{r.seconds_exposed:.2f}")
    )
    grid.add_row("seconds of training", *row(lambda r: f"{r.seconds:.1f}"), end_section=True)
    for label, cells in (planned or {}).items():
        grid.add_row(label, *cells)
    return Group(grid, Text(notes(results), style="dim"))


def times_less(result: Result) -> str:
    """How often the run's bytes fit into a synchronous run's."""
    moved = sum(result.bytes.values())
    return f"[bold]{result.synchronous_bytes / moved:.1f}" if moved else "nothing moved"


def notes(results: Sequence[Result]) -> str:
    """The small print: whose bytes these are, which of them were computed, and which model was validated."""
    share = results[0].replica_size
    return "\n".join(
        (
            "Loss: of the mean of all replicas, in fp32, on held-out bytes.",
            "Bytes: what one rank hands to the averages across replicas.",
            *(
                f"{result.name}: bytes are computed, one {result.gradient_dtype} gradient per step"
                + (f", 1/{share} of it per rank." if share > 1 else ".")
                for result in results
                if result.seconds_exposed is None
            ),
            "Seconds: here, where no link may be slow.",
            "Planned: arithmetic from these bytes and the time a step computes here,",
            "a node to a replica, gradients under the backward as far as they fit.",
        )
    )
