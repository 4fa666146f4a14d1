"""What a step costs on which nothing is averaged: DesLoc against torch's AdamW, in one run.

    python -m benchmarks.kernels.overhead [--tensors 1000] [--rounds 60]

Prints medians of paired rounds (ours, AdamW, ours, AdamW, ...) and writes them to benchmarks/results/overhead.json.
"""

import json
import platform
import statistics
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deslo_plugin import DesLoc

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUASI_HYPERBOLIC = {"momenta": [{"beta": 0.99, "weight": 0.9}]}
TWO = {"momenta": [{"beta": 0.9, "weight": 0.5}, {"beta": 0.99, "weight": 0.4}]}
FAR = {"sync_every": {"params": 10**9}}  # no average within the benchmark
CASES = {"N=1, w=1 (DES-LOC)": {}, "N=1, w=0.9 (MT-DAO)": QUASI_HYPERBOLIC, "N=2 (MT-DAO)": TWO}


def seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--numel", type=int, default=1024, help="elements of each tensor")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()

    def params() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(args.numel)) for _ in range(args.tensors)]
        for p in made:
            p.grad = torch.randn(args.numel)
        return made

    peer = torch.optim.AdamW(params(), lr=1e-3, foreach=True)
    ours = {name: DesLoc(params(), lr=1e-3, **FAR, **more) for name, more in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in ["AdamW(foreach=True)", *ours]}
    for _ in range(5):
        for optimizer in (peer, *ours.values()):
            optimizer.step()
    for _ in track(range(args.rounds), "paired rounds"):
        for name, optimizer in zip(times, (peer, *ours.values())):
            times[name].append(seconds(optimizer))

    base = times["AdamW(foreach=True)"]
    rows = [
        {
            "optimizer": name,
            "median_ms": 1e3 * statistics.median(each),
            "median_ratio_to_adamw": statistics.median(a / b for a, b in zip(each, base)),
        }
        for name, each in times.items()
    ]
    table = Table(title=f"{args.tensors} tensors of {args.numel} float32, {torch.get_num_threads()} thread(s)")
    for heading in ("optimizer", "median ms", "times AdamW"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for row in rows:
        table.add_row(row["optimizer"], f"{row['median_ms']:.2f}", f"{row['median_ratio_to_adamw']:.2f}")
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    facts = {
        "command": "python -m benchmarks.kernels.overhead",
        "arguments": vars(args),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    (RESULTS / "overhead.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
