"""Jobs whose averages travel through host memory, with what a test puts in the way; run on every rank of a world."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm import courier
from deslo_plugin.comm.staging import CopyStaging, Staged
from tests.support.jobs import batch, loss_of, net
from tests.support.torch_jobs import attached, train

_own = count()


def with_gloo_of_its_own(blocks: dict) -> dict:
    """By its time limit: what a test puts in its way meets nobody else's averages."""
    return blocks | {"deslo": blocks["deslo"] | {"transport": "host", "timeout_s": 90.0 + next(_own)}}


@contextmanager
def staged_by(make: type) -> Iterator[None]:
    with mock.patch.object(courier, "staging_of", lambda device: make()):
        yield


class Late(CopyStaging):
    """Copies to the host that take as long as they like, other times on every rank."""

    def wait(self, staged: Staged) -> None:
        time.sleep(random.Random(dist.get_rank() * 1000 + staged.buffer.numel()).random() / 50)


def two_optimizers(transport: str, steps: int) -> tuple[list[Tensor], int]:
    """Matrices by one DesLoc, vectors by another, on the same ranks; (the parameters, couriers that carried them)."""
    import deslo_plugin

    model, own = net(), []
    blocks = {
        "optimizer": {"params": {"lr": 1e-2, "sync_every": {"params": 2, "exp_avg": 3, "exp_avg_sq": 4}}},
        "deslo": {"replica_size": 1, "bucket_cap_mb": 1},
    }
    if transport == "host":
        blocks = with_gloo_of_its_own(blocks)
    with staged_by(Late):
        for params in ([p for p in model.parameters() if p.ndim == n] for n in (2, 1)):
            optimizer = deslo_plugin.DesLoc(params, blocks)
            own.append((optimizer, deslo_plugin.attach(model, optimizer)))
        for step in range(steps):
            loss_of(model, batch(dist.get_rank(), step, 0)).backward()
            for optimizer, _ in own:
                optimizer.step()
                optimizer.zero_grad()
    transports = [attachment.averaging.transport for _, attachment in own]
    couriers = {id(each.courier) for each in transports if transport == "host"}
    return [p.detach().clone() for p in model.parameters()], len(couriers)


def many_at_once(averages: int, seed: int) -> list[float]:
    """Starts that many averages of other sizes before it waits for the first; the value of each mean."""
    from deslo_plugin.comm.host_transport import HostTransport
    from deslo_plugin.comm.process_groups import make_groups
    from deslo_plugin.comm.topology import contiguous

    rank, world = dist.get_rank(), dist.get_world_size()
    groups = make_groups(contiguous(world, rank, 1), 600.0)
    with staged_by(Late):
        transports = [HostTransport(groups, timeout_s=70.0 + seed) for _ in range(2)]
        chunks = [torch.full((1 + 7 * index,), float(index * (rank + 1))) for index in range(averages)]
        works = [transports[index % 2].start(chunk) for index, chunk in enumerate(chunks)]
        for work in works:
            work.wait()
    assert all(torch.equal(chunk, torch.full_like(chunk, float(chunk[0]))) for chunk in chunks)
    return [float(chunk[0]) for chunk in chunks]


SECONDS = 7.0


def waited(blocks: dict, steps: int, behind: bool) -> dict:
    """What the meter says of an average that is launched after ``steps - 1`` steps. With a link that is ``behind`` it
    arrives once the training thread has waited for it, ``SECONDS`` by its clock; else it is there before."""
    gate, clock = threading.Event(), [100.0]

    class Gated(CopyStaging):
        def wait(self, staged: Staged) -> None:
            gate.wait(60)

    is_completed = courier.Parcel.is_completed

    def asked(parcel: courier.Parcel) -> bool:
        if not gate.is_set():
            clock[0] += SECONDS
            gate.set()
        return is_completed(parcel)

    with (
        staged_by(Gated),
        mock.patch.object(courier.Parcel, "is_completed", asked),
        mock.patch("time.perf_counter", lambda: clock[0]),
    ):
        model, optimizer, attachment = attached("plain", with_gloo_of_its_own(blocks))
        events = []
        attachment.averaging.listeners.append(events.append)
        train(model, optimizer, range(steps - 1))
        if not behind:
            gate.set()
        train(model, optimizer, range(steps - 1, steps))
    return {"exposed": attachment.stats.seconds_exposed, "flown": [event.seconds_in_flight for event in events]}


def broken_courier(blocks: dict) -> str:
    """The error that stops training where a copy to the host fails on rank 1."""

    class Broken(CopyStaging):
        def wait(self, staged: Staged) -> None:
            if dist.get_rank() == 1:
                raise RuntimeError("an illegal memory access was encountered")

    blocks = with_gloo_of_its_own(blocks)
    blocks["deslo"]["timeout_s"] /= 40
    with staged_by(Broken):
        model, optimizer, _ = attached("plain", blocks)
        try:
            train(model, optimizer, range(6))
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def held(blocks: dict, steps: int) -> tuple[int, int, list[float]]:
    """(host memory that averages held at most, as planned, parameters)."""
    model, optimizer, attachment = attached("ddp", with_gloo_of_its_own(blocks))
    train(model, optimizer, range(steps))
    buffers = attachment.averaging.transport.courier.staging(torch.device("cpu")).buffers
    assert buffers.used == 0 and buffers.idle <= buffers.peak
    return buffers.peak, attachment.plan.host_bytes, [float(p.detach().sum()) for p in model.parameters()]


def leaves_in_the_middle(rendezvous: str, rank: int) -> None:
    """A script that ends while an average flies that the other rank never comes to."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    blocks = {"optimizer": {"params": {"sync_every": {"params": 2}}}, "deslo": {"transport": "host"}}
    model, optimizer, attachment = attached("plain", blocks)
    train(model, optimizer, range(2 if rank == 0 else 1))
    if rank == 0:
        assert any(attachment.averaging.flights._table)
    print("done", flush=True)
    if rank == 1:
        input()


if __name__ == "__main__":
    import sys

    leaves_in_the_middle(sys.argv[1], int(sys.argv[2]))
