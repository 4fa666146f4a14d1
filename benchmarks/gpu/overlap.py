"""Does an average overlap with training, and are the meter's figures true?

    python -m benchmarks.gpu.overlap [--kind plain|ddp|fsdp2|zero2|zero3] [--link-ms 20] [--device cuda] [--out x.json]

A world of one rank over NCCL, with an artificial link that needs --link-ms, then ten times that, before each average.
On a GPU the link is copies from the host on a stream of its own, which leave all multiprocessors to the model; with
--link kernel it is one thread that waits on one of them, as NCCL's kernels wait for a slow link. For each link the
script prints the time of a step, what one average has added to its steps, and the seconds that the meter says were
waited. An average overlaps if it adds max(0, link - step); the meter is true if both grow alike with the link, to 5 %.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WORLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
os.environ |= WORLD | {"MASTER_PORT": os.environ.get("MASTER_PORT", "29555")}

import torch
import torch.distributed as dist
from torch import nn

import deslo_plugin
from deslo_plugin.comm.replica_transport import ReplicaTransport

KINDS = ("plain", "ddp", "fsdp2", "zero2", "zero3")
NEVER = 10**6
TRUE_TO = 0.05  # of what an average adds, or of a step
WORDS = 4096  # bytes; what ranks ask each other is as short, and crosses without delay
Step = Callable[[], None]


class Link:
    """Delays every average of this process by ``ms``."""

    def __init__(self, device: str, kernel: bool):
        self.ms, self.device = 0.0, device
        self._start, self._start_quantized = ReplicaTransport.start, ReplicaTransport.start_quantized
        if device == "cuda":
            self._stream, self._occupy = torch.cuda.Stream(), waiting_kernel() if kernel else copies()
        link = self
        ReplicaTransport.start = lambda transport, chunk: link.start(transport, chunk)
        ReplicaTransport.start_quantized = lambda transport, *given: link.start_quantized(transport, *given)

    def start(self, transport: Any, chunk: torch.Tensor) -> Any:
        if not self.ms or chunk.nbytes <= WORDS:
            return self._start(transport, chunk)
        if not chunk.is_cuda:
            return _Late(self._start(transport, chunk), time.perf_counter() + self.ms / 1e3)
        with self._behind():
            return self._start(transport, chunk)

    def start_quantized(self, transport: Any, *given: Any) -> Any:
        """In few bits the link is before the codes are made."""
        if not self.ms:
            return self._start_quantized(transport, *given)
        if self.device != "cuda":
            bucket, work = self._start_quantized(transport, *given)
            return bucket, _Late(work, time.perf_counter() + self.ms / 1e3)
        with self._behind():
            return self._start_quantized(transport, *given)

    @contextlib.contextmanager
    def _behind(self) -> Iterator[None]:
        """What is queued inside waits on the GPU until the link is through."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._occupy(self.ms)
            yield


class _Late:
    """An average on the host that is not there before ``at``."""

    def __init__(self, work: Any, at: float):
        self.work, self.at = work, at

    def wait(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))
        self.work.wait()


def copies() -> Callable[[float], None]:
    """Occupies the current stream for some milliseconds by what no multiprocessor does."""
    host, there = (
        torch.empty(1 << 24, dtype=torch.uint8, pin_memory=True),
        torch.empty(1 << 24, dtype=torch.uint8, device="cuda"),
    )
    each = ms_of(lambda: [there.copy_(host, non_blocking=True) for _ in range(100)]) / 100

    def occupy(ms: float) -> None:
        for _ in range(round(ms / each)):
            there.copy_(host, non_blocking=True)

    return occupy


def waiting_kernel() -> Callable[[float], None]:
    """Occupies the current stream, and a place on one multiprocessor, by its clock as it is when nothing else runs."""
    cycles = 100_000_000
    each = ms_of(lambda: torch.cuda._sleep(cycles))
    return lambda ms: torch.cuda._sleep(int(ms * cycles / each))


def ms_of(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, default="plain")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--link-ms", type=float, default=20)
    parser.add_argument("--link", choices=("copies", "kernel"), default="copies", help="what the link is on a GPU")
    parser.add_argument("--every", type=int, default=4, help="steps between averages of the parameters")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--deslo", type=json.loads, default={}, help="JSON that goes into the deslo block")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    given = parser.parse_args()
    logging.getLogger("deslo_plugin").setLevel(logging.ERROR)
    if given.device == "cuda":
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    if not given.kind.startswith("zero"):  # DeepSpeed makes its own
        dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    rows = measure(given, Link(given.device, given.link == "kernel"))
    if given.out:
        given.out.write_text(json.dumps({"kind": given.kind, "rows": rows}, indent=1) + "\n")
    os._exit(0)  # frameworks may hang as they take themselves apart


def measure(given: argparse.Namespace, link: Link) -> list[dict[str, Any]]:
    """A row for each link."""
    step, _ = contestant(given, NEVER)
    base = ms_per_step(step, given)
    del step
    rows: list[dict[str, Any]] = []
    for link.ms in (0.0, given.link_ms, 10 * given.link_ms):
        release(given.device)
        step, attachment = contestant(given, given.every)
        warm_up(step, given)
        before = attachment.stats.seconds_exposed
        taken = timed(step, given)
        waited = attachment.stats.seconds_exposed - before
        averages = given.steps // given.every
        row = {"link ms": link.ms, "step ms": base, "added ms": (taken - base) * given.every}
        row |= {"meter ms": 1e3 * waited / averages}
        first = rows[0] if rows else row
        by_link, by_meter = (row[name] - first[name] for name in ("added ms", "meter ms"))
        row["meter true"] = abs(by_link - by_meter) <= TRUE_TO * max(by_link, base)
        row["overlapped"] = 1 - by_link / link.ms if link.ms else 1.0
        if given.device == "cuda":
            row["peak MiB"] = torch.cuda.max_memory_allocated() >> 20
        rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
        told = f"step {base:8.2f} ms  added per average {row['added ms']:8.2f} ms  meter {row['meter ms']:8.2f} ms"
        verdict = (
            f"overlapped {100 * row['overlapped']:4.0f} %  meter within 5 %: {'yes' if row['meter true'] else 'NO'}"
        )
        print(f"{given.kind:6s} link {link.ms:6.1f} ms  {told}  {verdict}", flush=True)
        del step, attachment
    return rows


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def warm_up(step: Step, given: argparse.Namespace) -> None:
    for _ in range(4 * given.every + 2):  # what is timed begins and ends where nothing flies
        step()
    if given.device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, given: argparse.Namespace) -> float:
    """Milliseconds per step of a contestant that is warm."""
    start = time.perf_counter()
    for _ in range(given.steps):
        step()
    if given.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / given.steps * 1e3


def ms_per_step(step: Step, given: argparse.Namespace) -> float:
    warm_up(step, given)
    return timed(step, given)


def contestant(given: argparse.Namespace, every: int) -> tuple[Step, Any]:
    """A training step, and the attachment whose meter counts."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if given.kind.startswith("zero") and given.device == "cuda" else torch.float32
    with torch.device(given.device):
        model = nn.Sequential(*(nn.Linear(given.width, given.width) for _ in range(given.layers))).to(dtype)
        x = torch.randn(given.rows, given.width, dtype=dtype)
    periods = {"params": every, "exp_avg": None, "exp_avg_sq": None}
    config = {
        "optimizer": {"type": "DesLoc", "params": {"lr": 1e-6, "sync_every": periods}},
        "deslo": {"replica_size": 1, "bucket_cap_mb": 8192} | given.deslo,  # one chunk: it crosses the link once
    }
    if given.kind.startswith("zero"):
        return deepspeed_step(given, model, x, config)
    return torch_step(given, model, x, config)


def torch_step(given: argparse.Namespace, model: nn.Module, x: torch.Tensor, config: dict) -> tuple[Step, Any]:
    where: dict[str, Any] = {}
    if given.kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif given.kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(given.device, (1, 1), mesh_dim_names=("replicate", "shard"))
        for layer in model:
            fully_shard(layer, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        where = {"mesh": mesh}
    optimizer = deslo_plugin.DesLoc(model.parameters(), config)
    attachment = deslo_plugin.attach(model, optimizer, **where)

    def step() -> None:
        with torch.autocast(given.device, torch.bfloat16, enabled=given.device == "cuda"):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, attachment


def deepspeed_step(given: argparse.Namespace, model: nn.Module, x: torch.Tensor, config: dict) -> tuple[Step, Any]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; it would be compiled first
    ds = config | {
        "train_micro_batch_size_per_gpu": given.rows,
        "zero_optimization": {"stage": int(given.kind[-1])},
        "bf16": {"enabled": x.dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds)

    def step() -> None:
        engine.backward(engine(x).float().square().mean())
        engine.step()

    return step, engine.deslo


if __name__ == "__main__":
    main()
