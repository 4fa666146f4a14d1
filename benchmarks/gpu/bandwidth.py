"""How fast are the kernels: milliseconds, GB/s and percent of what a copy reaches on this card.

    python -m benchmarks.gpu.bandwidth [--device cuda] [--millions 1 16 128 512] [--out bandwidth.json]

Beside them torch.optim.AdamW(fused=True), and the time that the host needs for a step of 1,000 tensors.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from deslo_plugin import DesLoc
from deslo_plugin.kernels import update as ops
from deslo_plugin.kernels.quantize import BLOCK, FORMATS

TYPES = [  # of parameters and gradients, of states
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]
BETAS = [0.9, 0.99, 0.999]
PERIODS = {"params": 10**6, "exp_avg": 10**6, "exp_avg_sq": 10**6}


class Clock:
    """Times calls on one device and collects rows; ``ceiling`` is what a copy reaches in GB/s."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds, self.ceiling, self.rows = device, rounds, 0.0, []

    def ms(self, call: Callable[[], object]) -> float:
        """The median of ``rounds`` calls, by events on a GPU."""
        for _ in range(3):
            call()
        taken = []
        for _ in range(self.rounds):
            if self.device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                call()
                taken.append((time.perf_counter() - begin) * 1e3)
        return median(taken)

    def host_ms(self, call: Callable[[], object]) -> float:
        """What the host needs to queue a call, while the GPU works behind."""
        taken = []
        for _ in range(self.rounds):
            self.wait()
            begin = time.perf_counter()
            call()
            taken.append((time.perf_counter() - begin) * 1e3)
        self.wait()
        return median(taken)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def row(self, what: str, ms: float, nbytes: int, **more: float) -> None:
        speed = nbytes / ms / 1e6
        share = 100 * speed / self.ceiling if self.ceiling else 100.0
        self.rows.append({"what": what, "ms": round(ms, 4), "GB/s": round(speed, 1), "% of copy": round(share, 1)})
        self.rows[-1] |= more
        told = "".join(f"  {name} {value:.3f}" for name, value in more.items())
        print(f"{what:58s} {ms:9.3f} ms {speed:8.0f} GB/s {share:6.1f} % of copy{told}", flush=True)

    def rand(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(n, device=self.device).to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 16, 128, 512], help="elements, in 2^20")
    parser.add_argument("--tensors", type=int, default=1000, help="of the step whose host time is measured")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    given = parser.parse_args()
    clock = Clock(given.device, given.rounds)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(name, torch.__version__, ops.native())
    sizes = [int(millions * (1 << 20)) for millions in given.millions]
    copy(clock, max(sizes))
    for n in sizes:
        updates(clock, n)
    averages(clock, sorted(sizes)[-2:][0])
    few_bits(clock, sorted(sizes)[-2:][0])
    many_tensors(clock, given.tensors)
    if given.out:
        about = {"device": name, "torch": torch.__version__, "kernels": ops.native(), "copy GB/s": clock.ceiling}
        given.out.write_text(json.dumps(about | {"rows": clock.rows}, indent=1) + "\n")


def copy(clock: Clock, n: int) -> None:
    a, b = clock.rand(n), clock.rand(n)
    ms = clock.ms(lambda: b.copy_(a))
    clock.row(f"copy, {label(n)}, read and written", ms, 8 * n)
    clock.ceiling = clock.rows[-1]["GB/s"]


def updates(clock: Clock, n: int) -> None:
    """One tensor of ``n`` elements."""
    for dtype, kept in TYPES:
        x, g, v = clock.rand(n, dtype), clock.rand(n, dtype), clock.rand(n, kept)
        u = [clock.rand(n, kept) for _ in BETAS]
        for count in (1, 2, 3):
            moved = n * (3 * x.itemsize + 2 * (count + 1) * v.itemsize)
            what = f"adam N={count}, {label(n)}, x {short(dtype)}, states {short(kept)}"
            clock.row(what, clock.ms(adam(x, g, u[:count], v)), moved)
    p = torch.nn.Parameter(clock.rand(n))
    p.grad = clock.rand(n)
    step = torch.optim.AdamW([p], fused=True).step
    clock.row(f"torch AdamW fused, {label(n)}, float32", clock.ms(step), 28 * n)


def adam(x: Tensor, g: Tensor, u: list[Tensor], v: Tensor) -> Callable[[], None]:
    numbers = {"t": 10, "lr": 1e-4, "weight_decay": 0.1, "betas": BETAS[: len(u)], "weights": [1 / len(u)] * len(u)}
    numbers |= {"beta2": 0.95, "eps": 1e-8, "bias_correction": True}
    return lambda: ops.adam_([x], [g], [[u_j] for u_j in u], [v], **numbers)


def averages(clock: Clock, n: int) -> None:
    """What an average costs beside its travel."""
    local, mean, x = (clock.rand(n) for _ in range(3))
    drift = lambda l, m: lambda: torch.ops.deslo.drift([l], [m])
    clock.row(f"drift, {label(n)} float32", clock.ms(drift(local, mean)), 8 * n)
    clock.row(f"drift, {label(n)} float32, unaligned by one", clock.ms(drift(local[1:], mean[1:])), 8 * (n - 1))
    fingerprint = lambda tensor: lambda: torch.ops.deslo.fingerprint([tensor])
    clock.row(f"fingerprint, {label(n)} float32", clock.ms(fingerprint(local)), 4 * n)
    clock.row(f"fingerprint, {label(n)} float32, unaligned by one", clock.ms(fingerprint(local[1:])), 4 * (n - 1))
    land = lambda: torch.ops.deslo.land_([x], [local], [mean], 0.9)
    clock.row(f"land_, {label(n)} float32", clock.ms(land), 16 * n)


def few_bits(clock: Clock, n: int, replicas: int = 4) -> None:
    """What it costs beside its travel that an average is sent in few bits."""
    blocks = n // BLOCK // replicas * replicas
    part, n = blocks // replicas, blocks * BLOCK
    values, bases, errors, means = (clock.rand(n) for _ in range(4))
    own, shares = clock.rand(part * BLOCK).view(part, BLOCK), torch.full((replicas,), 1 / replicas, device=clock.device)
    for name in ("int8", "float8", "int4"):
        number, size = FORMATS[name].number, FORMATS[name].record_bytes
        records, mean = (torch.empty(count, size, dtype=torch.uint8, device=clock.device) for count in (blocks, part))
        received, ops = records.view(replicas, part, size), torch.ops.deslo
        calls = {  # and the bytes that each moves
            "quantize": ([values], [bases], [errors], records, own, 0, number),
            "mean_quantized": (received, own, shares, 1, mean, number),
            "dequantize": (records, [bases], [means], number),
            "carry_": ([values], [bases], [errors], [means], received[None], own[None], 1, number),
        }
        whole, share, sent = 4 * n, 4 * n // replicas, size * blocks
        moved = {
            "quantize": 3 * whole + sent + share,
            "mean_quantized": sent * (replicas - 1) // replicas + 2 * share + size * part,
            "dequantize": sent + 2 * whole,
            "carry_": 6 * whole + sent,
        }
        for operator, arguments in calls.items():
            ms = clock.ms(lambda operator=operator, arguments=arguments: getattr(ops, operator)(*arguments))
            clock.row(f"{operator}, {label(n)}, {name}", ms, moved[operator])


def many_tensors(clock: Clock, count: int) -> None:
    """A whole step of a model of many parameters: the host's time decides here."""
    for size in (1024, 1 << 18):
        params = [torch.nn.Parameter(clock.rand(size if clock.device == "cuda" else 64)) for _ in range(count)]
        for p in params:
            p.grad = torch.rand_like(p)
        optimizers = {
            "DesLoc.step": DesLoc(params, lr=1e-4, sync_every=PERIODS),
            "torch AdamW fused step": torch.optim.AdamW(params, fused=True),
        }
        for name, optimizer in optimizers.items():
            moved = 28 * sum(p.numel() for p in params)
            ms = clock.ms(optimizer.step)
            clock.row(f"{name}, {count} x {size}", ms, moved, **{"host ms": clock.host_ms(optimizer.step)})


def label(n: int) -> str:
    return f"{n / (1 << 20):g}M"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
