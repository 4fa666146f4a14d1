"""Averages through host memory on one GPU: are their bits right, and do they spare the device?

    python -m benchmarks.gpu.host [--device cuda|cpu] [--ranks 2] [--mb 64] [--link-ms 200] [--out x.json]

``--ranks`` processes share one device, and their averages go over gloo. First, bits: means of many sizes, launched and
landed on other streams while memory is freed and taken again, and a model that trains, against the device transport.
Then, time: one average over a link that needs --link-ms, with matrices multiplied between launch and landing, and with
a device-wide synchronisation right after the launch, as DeepSpeed makes them. The link of the host transport is a sleep
of the courier; that of the device transport is a kernel that waits. Prints a table; exits 1 if a bit is wrong.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deslo_plugin
from deslo_plugin.comm.host_transport import HostTransport
from deslo_plugin.comm.process_groups import make_groups
from deslo_plugin.comm.replica_transport import ReplicaTransport
from deslo_plugin.comm.staging import staging_of
from deslo_plugin.comm.topology import contiguous

TIMEOUT_S = 120.0
SIZES = (1, 3, 1000, 65_537, 1 << 20)
COLUMNS = ("average", "between", "launch", "synchronize", "matrices", "landing", "sum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mb", type=int, default=64, help="of the average that is timed (%(default)s)")
    parser.add_argument("--link-ms", type=float, default=200.0)
    parser.add_argument("--rounds", type=int, default=20, help="of the bits (%(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="of the matrices (%(default)s)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (given, folder), nprocs=given.ranks)
        result = json.loads((Path(folder) / "result.json").read_text())
    print(
        f"device {result['device']}, {given.ranks} rank(s), {given.mb} MiB, a link of {given.link_ms:g} ms; times in ms"
    )
    for line in [COLUMNS, *result["rows"]]:
        print("  ".join(f"{each:>16.1f}" if isinstance(each, float) else f"{each:>16}" for each in line))
    print(f"means against those on {result['reference']}: {result['compared']}, wrong: {result['wrong'] or 'none'}")
    if given.out:
        given.out.write_text(json.dumps(result, indent=1))
    sys.exit(1 if result["wrong"] else 0)


def rank_main(rank: int, given: argparse.Namespace, folder: str) -> None:
    logging.getLogger("deslo_plugin").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(given.ranks), "LOCAL_WORLD_SIZE": str(given.ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=given.ranks)
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    groups = make_groups(contiguous(given.ranks, rank, 1), TIMEOUT_S)
    ways = {"device": ReplicaTransport(groups, timeout_s=TIMEOUT_S), "host": HostTransport(groups, timeout_s=TIMEOUT_S)}
    reference = device
    if not _works(ways["device"], device):  # a torch whose gloo does not average tensors of a GPU
        reference = torch.device("cpu")
    compared, wrong = compare_means(ways, device, reference, given.rounds)
    if given.ranks > 1 and reference == device:
        compared, wrong = compared + 1, wrong + compare_training(device)
    rows = [
        [name, between, *timed(way, device, given, between == "synchronize")]
        for name, way in ways.items()
        if name == "host" or reference == device
        for between in ("matrices", "synchronize")
    ]
    everyone: list[Any] = [None] * given.ranks
    dist.all_gather_object(everyone, wrong)
    if rank == 0:
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        found = [f"rank {at}: {each}" for at, one in enumerate(everyone) for each in one]
        result = {"device": kind, "compared": compared, "wrong": found, "rows": rows, "reference": reference.type}
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.barrier()


def _works(way: Any, device: torch.device) -> bool:
    try:
        way.start(torch.ones(4, device=device)).wait()
    except RuntimeError as error:
        print(f"no averages of {device} by gloo from device to device: {error.__cause__ or error}", flush=True)
        return False
    return True


def compare_means(
    ways: dict[str, Any], device: torch.device, reference: torch.device, rounds: int
) -> tuple[int, list[str]]:
    """(means that were compared, what was wrong); those of the device transport are of tensors on ``reference``."""
    compared, wrong = 0, []
    for seed in range(rounds):
        dtype = (torch.float32, torch.float64)[seed % 2]
        means = {
            "device": _means(ways["device"], reference, seed, dtype, busy=False),
            "host": _means(ways["host"], device, seed, dtype, busy=True),
        }
        for size, device_mean, host_mean in zip(SIZES, means["device"], means["host"]):
            compared += 1
            if not torch.equal(device_mean, host_mean):
                apart = int((device_mean != host_mean).sum())
                wrong.append(f"round {seed}, {size} of {dtype}: {apart} elements differ")
    return compared, wrong


def _means(way: Any, device: torch.device, seed: int, dtype: torch.dtype, busy: bool) -> list[torch.Tensor]:
    """All sizes at once, launched on one stream and landed on another, with memory that comes and goes between."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    values = [torch.randn(size, generator=generator, dtype=dtype) for size in SIZES]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" and busy else []

    def on(index: int) -> Any:
        return torch.cuda.stream(streams[index]) if streams else nullcontext()

    with on(0):
        works, chunks = [], []
        for value in values:
            _occupy(device, busy)
            chunk = value.to(device).mul_(2).div_(2)  # a kernel that the copy must wait for
            works.append(way.start(chunk))
            chunks.append(chunk)
            torch.full((value.numel(),), float("nan"), dtype=dtype, device=device)  # freed at once
    if streams:
        streams[1].wait_stream(streams[0])
    with on(1):
        for work, chunk in zip(works, chunks):
            work.wait()
            torch.full_like(chunk, float("nan"))
            _occupy(device, busy)
        found = [chunk.clone() for chunk in chunks]
    if streams:
        streams[1].synchronize()
    return [each.cpu() for each in found]


def _occupy(device: torch.device, busy: bool) -> None:
    if busy and device.type == "cuda":
        torch.cuda._sleep(200_000)  # cycles: what is queued behind it comes late


def compare_training(device: torch.device) -> list[str]:
    """What is wrong with parameters trained by way of the host."""
    trained = {}
    for transport in ("device", "host"):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(64, 257), nn.Tanh(), nn.Linear(257, 5)).to(device)
        every = {"params": 2, "exp_avg": 3, "exp_avg_sq": 4}
        blocks = {
            "optimizer": {"params": {"lr": 1e-2, "sync_every": every}},
            "deslo": {"replica_size": 1, "transport": transport, "timeout_s": TIMEOUT_S},
        }
        optimizer = deslo_plugin.DesLoc(model.parameters(), blocks)
        deslo_plugin.attach(model, optimizer)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(13):
            model(torch.randn(8, 64, generator=generator).to(device)).square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            optimizer.step()
            optimizer.zero_grad()
        trained[transport] = [param.detach().cpu() for param in model.parameters()]
    same = all(torch.equal(p, q) for p, q in zip(trained["device"], trained["host"]))
    return [] if same else ["parameters trained by way of the host differ"]


def timed(way: Any, device: torch.device, given: argparse.Namespace, synchronize: bool) -> list[float]:
    """Milliseconds of the host in each part of one average, the best of three."""
    matrix = torch.randn(given.width, given.width, device=device)
    start = _delayed(way, device, given.link_ms)
    chunk = torch.ones(given.mb << 18, device=device)
    parts = []
    for _ in range(4):
        _drain(device)
        dist.barrier()
        marks = [time.perf_counter()]
        work = start(chunk)
        marks.append(time.perf_counter())
        if synchronize:
            _drain(device)
        marks.append(time.perf_counter())
        end = marks[0] + 0.5 * given.link_ms / 1e3
        while time.perf_counter() < end or marks[-1] == marks[-2]:  # half a link of computing, at least one product
            torch.mm(matrix, matrix)
            _stream(device)
            marks[3:] = [time.perf_counter()]
        work.wait()
        _drain(device)
        marks.append(time.perf_counter())
        parts.append([1e3 * (b - a) for a, b in zip(marks, marks[1:])] + [1e3 * (marks[-1] - marks[0])])
    return min(parts[1:], key=lambda each: each[-1])


def _delayed(way: Any, device: torch.device, ms: float) -> Callable[[torch.Tensor], Any]:
    """``way.start`` behind a link that needs ``ms``."""
    if isinstance(way, HostTransport):
        staging = staging_of(device)
        arrive = staging.wait

        def wait(staged: Any) -> None:
            arrive(staged)
            time.sleep(ms / 1e3)

        staging.wait = wait
        way.courier._stagings[device] = staging
        return way.start
    if device.type == "cpu":

        def start(chunk: torch.Tensor) -> Any:
            until, work = time.perf_counter() + ms / 1e3, way.start(chunk)
            wait = work.wait

            class Late:
                def wait(self) -> None:
                    time.sleep(max(0.0, until - time.perf_counter()))
                    wait()

            return Late()

        return start
    cycles, link = _cycles_per_ms(), torch.cuda.Stream(device)

    def start_behind_a_kernel(chunk: torch.Tensor) -> Any:
        link.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(link):
            torch.cuda._sleep(int(ms * cycles))
            return way.start(chunk)

    return start_behind_a_kernel


def _cycles_per_ms() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    start.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    end.synchronize()
    return 100_000_000 / start.elapsed_time(end)


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _stream(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()


if __name__ == "__main__":
    main()
