"""How long the operators of few bits take on the CPU, against torch's and against the memory traffic that they cannot
avoid.

    python -m benchmarks.kernels.quantize [--threads 1 2] [--millions 32] [--rounds 9] [--formats int8 ...] [--cpu-time]

Contestants run once per round in an order that changes. Tables show medians over rounds, the median of each round's
ratio to the kernel, and the share of the speed of ``traffic``: the same bytes in one pass of reads and writes without
arithmetic. ``torch`` is the reference, ``torch.compile`` the same formula compiled, for the formats of ``--compiled``
and what is one expression. ``--cpu-time`` is for a machine with other work on it: seconds that the process ran, divided
by its threads, in place of seconds that went by. Raw times go to benchmarks/results/quantize.json, the tables to
quantize.txt.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kernels.step import save, timed
from deslo_plugin.kernels import quantize as reference
from deslo_plugin.kernels.quantize import BLOCK, FORMATS, ROOTED, Format, decode, encode

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "results" / "quantize.json"
EACH = FORMATS | {f"rooted {name}": format for name, format in ROOTED.items() if format.rooted}
READ, WRITTEN, BOTH = 1, 2, 3
STEP = 16  # blocks that ``traffic`` takes of a tensor at once
REPLICAS, RANK = 4, 1
Moved = Sequence[tuple[Tensor, int]]  # tensors, and whether they are read or written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--millions", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", nargs="+", default=list(EACH), choices=list(EACH))
    parser.add_argument("--compiled", nargs="*", default=["int8"], choices=list(EACH))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if len(options.threads) > 1:  # torch.compile bakes the number of threads in: one process for each
        runs = [run for threads in options.threads for run in _in_own_process(threads, options)]
    else:
        torch.set_num_threads(options.threads[0])
        runs = [run for name in options.formats for run in measure(name, options)]
    save(options.out, runs)
    console = Console(width=110, record=True)
    console.print(f"$ python -m benchmarks.kernels.quantize {' '.join(_passed_on(options))}")
    for threads in options.threads:
        for operator in ("quantize", "mean_quantized", "dequantize", "carry_"):
            show(console, [each for each in runs if (each["operator"], each["threads"]) == (operator, threads)])
    options.out.with_suffix(".txt").write_text(console.export_text())


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    """Seconds of every contestant for the four operators, one list entry per round."""
    torch.manual_seed(0)
    size, threads = options.millions << 20, torch.get_num_threads()
    clock = (lambda: time.process_time() / threads) if options.cpu_time else time.perf_counter
    format, blocks, part = EACH[name], size // BLOCK, size // BLOCK // REPLICAS
    values, bases, errors, means = (torch.randn(size) for _ in range(4))
    records, own = torch.empty(blocks, format.record_bytes, dtype=torch.uint8), torch.randn(part, BLOCK)
    torch.ops.deslo.quantize([values], [bases], [], records, own, 0, format.number)
    shares, mean = torch.full((REPLICAS,), 1 / REPLICAS), torch.empty(part, format.record_bytes, dtype=torch.uint8)
    received = records.view(REPLICAS, part, -1)
    others = [each for rank, each in enumerate(received) if rank != RANK]
    values_read, tail = [(values, READ), (bases, READ), (errors, READ)], (format.number,)
    calls: dict[str, tuple[tuple, Callable, Moved, Callable | None]] = {
        "quantize": (
            ([values], [bases], [errors], records, own, 0, *tail),
            reference.quantize_reference,
            [*values_read, (records, WRITTEN), (own, WRITTEN)],
            partial(_quantize, format, values, bases, errors, records, own),
        ),
        "mean_quantized": (
            (received, own, shares, RANK, mean, *tail),
            reference.mean_reference,
            [*((each, READ) for each in others), (own, BOTH), (mean, WRITTEN)],
            None,
        ),
        "dequantize": (
            (records, [bases], [means], *tail),
            reference.dequantize_reference,
            [(records, READ), (bases, READ), (means, WRITTEN)],
            partial(_dequantize, format, records, bases, means),
        ),
        "carry_": (
            ([values], [bases], [errors], [means], received[None], own[None], RANK, *tail),
            reference.carry_reference,
            [(values, READ), (bases, BOTH), (errors, BOTH), (means, READ), (records, READ)],
            None,
        ),
    }
    runs = []
    for operator, (arguments, composed, moved, compiled) in calls.items():
        contestants = {
            "traffic": traffic(moved),
            "deslo": partial(getattr(torch.ops.deslo, operator), *arguments),
            "torch": partial(composed, *arguments),
        }
        if compiled and name in options.compiled and (step := _compiled(compiled)):
            contestants["torch.compile"] = step
        runs.append(
            {
                "operator": operator,
                "format": name,
                "elements": size,
                "threads": threads,
                "bytes": sum(each.nbytes * (2 if kind == BOTH else 1) for each, kind in moved),
                "seconds": timed(contestants, options.rounds, clock),
            }
        )
    return runs


def _quantize(format: Format, values: Tensor, bases: Tensor, errors: Tensor, records: Tensor, own: Tensor) -> None:
    y = (values - bases + errors).view(-1, BLOCK)
    records.copy_(encode(y, format))
    own.copy_(y[: len(own)])


def _dequantize(format: Format, records: Tensor, bases: Tensor, means: Tensor) -> None:
    means.copy_(bases + decode(records, format).view(-1))


def _compiled(function: partial) -> Callable[[], object] | None:
    torch._dynamo.reset()
    format, *tensors = function.args
    compiled = torch.compile(lambda *tensors: function.func(format, *tensors), fullgraph=True)
    try:
        compiled(*tensors)
    except Exception as error:
        print(f"torch.compile is left out: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return lambda: compiled(*tensors)


def traffic(moved: Moved) -> Callable[[], None]:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "stream.so"
        subprocess.run(
            ["cc", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC", HERE / "stream.c", "-o", built],
            check=True,
        )
        run = ctypes.CDLL(str(built)).traffic
    # a tensor of a part of the elements moves as many bytes as it has, in as many steps
    steps = min(each.nbytes for each, _ in moved) // (STEP * 4 * 17)
    tensors = [each.clone() for each, _ in moved]
    count = len(tensors)
    pointers = (ctypes.c_void_p * count)(*(each.data_ptr() for each in tensors))
    nbytes = (ctypes.c_long * count)(*(each.nbytes // steps // 4 * 4 for each in tensors))
    kinds = (ctypes.c_int * count)(*(kind for _, kind in moved))
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)

    def part(index: int) -> None:
        begin, end = (steps * i // threads for i in (index, index + 1))
        run(pointers, nbytes, kinds, count, ctypes.c_long(begin), ctypes.c_long(end))

    def step(kept: object = tensors) -> None:
        list(pool.map(part, range(threads)))

    return step


def show(console: Console, runs: list[dict]) -> None:
    first = runs[0]
    title = f"{first['operator']}, {first['elements'] >> 20}M elements, {first['threads']} thread(s)"
    times = ["traffic", "torch", "torch.compile"]
    table = Table("format", "ms", "GB/s", "share of traffic", *(f"{each} / deslo" for each in times[1:]), title=title)
    for run in runs:
        ours = run["seconds"]["deslo"]
        ratios = {name: f"{median(e / o for e, o in zip(each, ours)):.2f}" for name, each in run["seconds"].items()}
        speed = run["bytes"] / median(ours) / 1e9
        table.add_row(
            run["format"], f"{median(ours) * 1e3:.1f}", f"{speed:.1f}", *(ratios.get(name, "") for name in times)
        )
    console.print(table)


def _passed_on(options: argparse.Namespace) -> list[str]:
    numbers = ["--millions", str(options.millions), "--rounds", str(options.rounds)]
    return [*numbers, "--compiled", *options.compiled, *["--cpu-time"] * options.cpu_time]


def _in_own_process(threads: int, options: argparse.Namespace) -> list[dict]:
    out = options.out.with_suffix(f".{threads}.json")
    command = [sys.executable, "-m", "benchmarks.kernels.quantize", "--threads", str(threads), "--out", out]
    subprocess.run([*command, *_passed_on(options), "--formats", *options.formats], check=True)
    runs = json.loads(out.read_text())["runs"]
    out.unlink()
    out.with_suffix(".txt").unlink()
    return runs


if __name__ == "__main__":
    main()
