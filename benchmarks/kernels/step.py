"""How long one optimizer step takes on the CPU, against its peers and against the memory traffic that it cannot avoid.

    python -m benchmarks.kernels.step [--threads 1 2] [--millions 1 16 128] [--momenta 1 2 3] [--rounds 15]
    python -m benchmarks.kernels.step --averages [--threads 1 2] [--millions 1 16 128] [--rounds 15]

Every contestant has buffers of its own and steps once per round, in an order that changes; the table shows medians over
rounds, the median of each round's ratio to the kernels, and the share of the speed of ``stream``: the same bytes in one
pass of reads and writes without arithmetic (20 + 8 N bytes per parameter). The raw times go to benchmarks/results/.
``--averages`` measures the operators of the averages instead, ``deslo::drift`` and ``deslo::land_``, against torch's.
"""

import argparse
import ctypes
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deslo_plugin import DesLoc
from deslo_plugin.algorithm import rules
from deslo_plugin.kernels import delayed_update as landing
from deslo_plugin.kernels import update as ops

HERE = Path(__file__).resolve().parent
BETAS, BETA2, LR, EPS, WEIGHT_DECAY = [0.9, 0.99, 0.999], 0.95, 1e-4, 1e-8, 0.1
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--momenta", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=15, help="at 128M parameters; smaller sizes take more")
    parser.add_argument("--averages", action="store_true", help="drift and landing in place of the step")
    parser.add_argument("--out", type=Path, help="by default results/step.json, with --averages results/averages.json")
    options = parser.parse_args()
    options.out = options.out or HERE.parent / "results" / ("averages.json" if options.averages else "step.json")
    if len(options.threads) > 1:  # torch.compile bakes the number of threads in: one process for each
        parts = [_in_own_process(threads, options) for threads in options.threads]
        save(options.out, [run for part in parts for run in part["runs"]])
        return
    torch.set_num_threads(options.threads[0])
    measured = [measure_averages] if options.averages else [partial(measure, momenta) for momenta in options.momenta]
    runs = [
        each(millions << 20, options.rounds * min(20, 128 // millions))
        for millions in options.millions
        for each in measured
    ]
    save(options.out, runs)


def save(out: Path, runs: list[dict]) -> None:
    """One line per run, after what they ran with."""
    about = {"cpu": _cpu(), "torch": torch.__version__, "native": ops.native()}
    out.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(run) for run in runs)
    out.write_text(f'{json.dumps(about)[:-1]}, "runs": [\n{lines}\n]}}\n')


def measure(momenta: int, size: int, rounds: int) -> dict:
    """Seconds per step of every contestant, one list entry per round."""
    torch.manual_seed(0)
    g = torch.randn(size).mul_(1e-3)
    contestants = {
        name: build(g, momenta) for name, build in CONTESTANTS.items() if momenta == 1 or name not in ONE_MOMENTUM
    }
    seconds = timed({name: step for name, step in contestants.items() if step is not None}, rounds)
    title = f"{size >> 20}M parameters, N = {momenta}, {torch.get_num_threads()} thread(s)"
    _show(title, size * (20 + 8 * momenta), seconds, "deslo kernels", "stream")
    return {"parameters": size, "momenta": momenta, "threads": torch.get_num_threads(), "seconds": seconds}


def measure_averages(size: int, rounds: int) -> dict:
    """Seconds of drift and of landing, by the kernels and by torch's operators."""
    torch.manual_seed(0)
    x, local, mean = (torch.randn(size) for _ in range(3))

    def composed_drift() -> Tensor:
        return torch.stack([(local - mean).square().sum(), local @ mean, mean @ mean])

    def composed_landing() -> None:
        x.add_(mean - local, alpha=0.9)

    drift = timed(
        {"deslo::drift": lambda: torch.ops.deslo.drift([local], [mean]), "torch, drift": composed_drift}, rounds
    )
    land = timed(
        {"deslo::land_": lambda: landing.land_([x], [local], [mean], 0.9), "torch, landing": composed_landing}, rounds
    )
    for seconds, passes in ((drift, 2), (land, 4)):
        ours = next(iter(seconds))
        _show(f"{size >> 20}M elements, {torch.get_num_threads()} thread(s)", 4 * size * passes, seconds, ours)
    return {"elements": size, "threads": torch.get_num_threads(), "seconds": drift | land}


def timed(
    steps: dict[str, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each by ``clock``, once per round, in an order that changes."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):
            start = clock()
            steps[name]()
            seconds[name].append(round(clock() - start, 7))
    return seconds


def states(g: Tensor, momenta: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, u, v as after some training with these gradients; nothing is zero or subnormal."""
    return torch.randn_like(g).mul_(0.02), [g.clone() for _ in range(momenta)], g.square().add_(1e-7)


def stream(g: Tensor, momenta: int) -> Step:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "stream.so"
        subprocess.run(
            ["cc", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC", HERE / "stream.c", "-o", built],
            check=True,
        )
        run = ctypes.CDLL(str(built)).stream
    x, u, v = states(g, momenta)
    tensors = [x, v, *u]
    pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    threads, size = torch.get_num_threads(), g.numel()
    pool = ThreadPoolExecutor(threads)

    def part(index: int) -> None:
        begin, end = (size * i // threads for i in (index, index + 1))
        run(ctypes.c_void_p(g.data_ptr()), pointers, len(tensors), ctypes.c_long(begin), ctypes.c_long(end))

    def step() -> None:
        if threads == 1:
            part(0)
        else:
            list(pool.map(part, range(threads)))

    return step


def numbers(momenta: int) -> dict:
    return {
        "t": 100,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "betas": BETAS[:momenta],
        "weights": [1 / momenta] * momenta,
        "beta2": BETA2,
        "eps": EPS,
        "bias_correction": True,
    }


def kernels(g: Tensor, momenta: int) -> Step:
    x, u, v = states(g, momenta)
    return lambda: ops.adam_([x], [g], [[u_j] for u_j in u], [v], **numbers(momenta))


def bfloat16_states(g: Tensor, momenta: int) -> Step:
    x, u, v = states(g, momenta)
    u, v = [u_j.bfloat16() for u_j in u], v.bfloat16()
    return lambda: ops.adam_([x], [g], [[u_j] for u_j in u], [v], **numbers(momenta))


def optimizer(g: Tensor, momenta: int) -> Step:
    p = torch.nn.Parameter(torch.randn_like(g).mul_(0.02))
    p.grad = g
    one = [{"beta": beta, "weight": 1 / momenta, "sync_every": None} for beta in BETAS[:momenta]]
    return DesLoc(
        [p],
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        momenta=one,
        second_moment={"beta": BETA2, "sync_every": None},
        sync_every={"params": 10**6},
    ).step


def python_rules(g: Tensor, momenta: int) -> Step:
    x, u, v = states(g, momenta)
    return lambda: rules.adam_([x], [g], [[u_j] for u_j in u], [v], **numbers(momenta))


def compiled(g: Tensor, momenta: int) -> Step:
    x, u, v = states(g, momenta)

    def adam(x: Tensor, g: Tensor, u: list[Tensor], v: Tensor) -> None:
        v.mul_(BETA2).add_(g * g, alpha=1 - BETA2)
        d = sum(u_j.mul_(beta).add_(g, alpha=1 - beta) for u_j, beta in zip(u, BETAS)) / len(u)
        x.mul_(1 - LR * WEIGHT_DECAY).sub_(LR * d / (v.sqrt() + EPS))

    torch._dynamo.reset()
    step = torch.compile(adam, fullgraph=True)
    return lambda: step(x, g, u, v)


def adamw(**kind: bool) -> Callable[[Tensor, int], Step]:
    def build(g: Tensor, momenta: int) -> Step:
        p = torch.nn.Parameter(torch.randn_like(g).mul_(0.02))
        p.grad = g
        return torch.optim.AdamW([p], lr=LR, betas=(BETAS[0], BETA2), eps=EPS, weight_decay=WEIGHT_DECAY, **kind).step

    return build


def deepspeed_cpu_adam(g: Tensor, momenta: int) -> Step | None:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        p = torch.nn.Parameter(torch.randn_like(g).mul_(0.02))
        p.grad = g
        return DeepSpeedCPUAdam([p], lr=LR, betas=(BETAS[0], BETA2), eps=EPS, weight_decay=WEIGHT_DECAY).step
    except Exception as error:
        print(f"DeepSpeedCPUAdam is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None


CONTESTANTS = {
    "stream": stream,
    "deslo kernels": kernels,
    "bfloat16 states": bfloat16_states,
    "DesLoc.step": optimizer,
    "torch AdamW fused": adamw(fused=True),
    "DeepSpeedCPUAdam": deepspeed_cpu_adam,
    "torch.compile": compiled,
    "torch AdamW foreach": adamw(foreach=True),
    "deslo without kernels": python_rules,
}
ONE_MOMENTUM = {"torch AdamW fused", "torch AdamW foreach", "DeepSpeedCPUAdam"}


def _show(title: str, nbytes: int, seconds: dict[str, list[float]], ours: str, ceiling: str | None = None) -> None:
    """``nbytes``: what one pass of the kernel must move."""
    table = Table("", "ms", "time / kernel", "GB/s", *(["share of stream"] if ceiling else []), title=title)
    for name, each in seconds.items():
        row = [
            name,
            f"{median(each) * 1e3:.2f}",
            f"{median(e / o for e, o in zip(each, seconds[ours])):.2f}",
            f"{nbytes / median(each) / 1e9:.1f}",
        ]
        if ceiling:
            row.append(f"{median(c / e for c, e in zip(seconds[ceiling], each)):.2f}")
        table.add_row(*row)
    Console(width=100).print(table)


def _in_own_process(threads: int, options: argparse.Namespace) -> dict:
    out = options.out.with_suffix(f".{threads}.json")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.kernels.step",
            "--threads",
            str(threads),
            "--millions",
            *map(str, options.millions),
            "--momenta",
            *map(str, options.momenta),
            "--rounds",
            str(options.rounds),
            "--out",
            out,
            *["--averages"] * options.averages,
        ],
        check=True,
    )
    part = json.loads(out.read_text())
    out.unlink()
    return part


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
