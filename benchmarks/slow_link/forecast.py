"""What ``deslo plan`` predicts for the link of benchmarks/slow_link/link.py, beside what was measured there.

    python -m benchmarks.slow_link.forecast

Reads benchmarks/results/link.json and measures nothing itself. The planner is told the rate of the link, less headers,
and the time of a step without communication; everything else it works out.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.slow_link.network import WIRE_PER_PAYLOAD
from deslo_plugin import load_config
from deslo_plugin.planning.comparison import HIDDEN, IN_TURN, OWN, SYNCHRONOUS, Job, methods
from deslo_plugin.planning.forecast import Link

RESULTS = Path(__file__).resolve().parents[1] / "results" / "link.json"
PARAMETERS = 635_776  # of the GPT that link.py trains
CYCLES = 100  # longest periods: as good as endless
TIMES = {"des-loc": (1, 3, 6), "local-adam": (1, 1, 1), "mt-dao": (1, 1, 1), "ddp": (1, 1, 1), "hsdp": (1, 1, 1)}


@dataclass(frozen=True)
class Compared:
    """Mean seconds of a step of one contestant at one rate. Synchronous training has two predictions: ``predicted_s``
    waits for all of its gradients, ``at_best_s`` hides them under backward."""

    rate: str
    name: str
    floor_s: float
    measured_s: float
    predicted_s: float
    at_best_s: float | None

    @property
    def error(self) -> float:
        """Of the predicted step, relative to the measured one."""
        return self.predicted_s / self.measured_s - 1


def compare(results: Mapping[str, Any]) -> Iterator[Compared]:
    """Every contestant of ours, and synchronous training, at every rate that was shaped."""
    for rate, rows in results["rates"].items():
        if rate == "unshaped":
            continue
        link = Link(float(rate.split()[0]) / 1e3 / WIRE_PER_PAYLOAD)
        for row in rows:
            kind = row["name"].removesuffix("-in-turn").removesuffix("-fsdp")
            if kind not in TIMES:
                continue
            ranks = 2 if "fsdp" in row["name"] or kind == "hsdp" else 1
            floor = row["floor_ms"] / 1e3
            seen = predicted(kind, results["period"], ranks, floor, link)
            measured = floor * (1 + row["exposed"])
            if kind in ("ddp", "hsdp"):
                yield Compared(rate, row["name"], floor, measured, seen[SYNCHRONOUS], seen[HIDDEN])
            else:
                name = IN_TURN if row["name"].endswith("-in-turn") else OWN
                yield Compared(rate, row["name"], floor, measured, seen[name], None)


def predicted(kind: str, period: int, ranks: int, floor_s: float, link: Link) -> dict[str, float]:
    """Method -> mean seconds of a step."""
    periods = dict(zip(("params", "exp_avg", "exp_avg_sq"), (times * period for times in TIMES[kind])))
    config = load_config({"optimizer": {"params": {"sync_every": periods}}, "deslo": {"replica_size": ranks}})
    steps = CYCLES * 6 * period
    job = Job(config, PARAMETERS, 2, ranks, floor_s, steps)
    return {method.name: 3600 * method.on(link).hours / steps for method in methods(job)}


def main() -> None:
    columns = ("without\nms", "measured\nms", "predicted\nms", "error", "overlapped\nat best, ms")
    table = Table("", *columns, title="Mean step, predicted and measured")
    rate = ""
    for each in compare(json.loads(RESULTS.read_text())):
        if each.rate != rate:
            table.add_section()
            table.add_row(rate := each.rate)
        best = "" if each.at_best_s is None else f"{each.at_best_s * 1e3:.1f}"
        table.add_row(
            each.name,
            f"{each.floor_s * 1e3:.1f}",
            f"{each.measured_s * 1e3:.1f}",
            f"{each.predicted_s * 1e3:.1f}",
            f"{each.error:+.1%}",
            best,
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
