"""Jobs with live membership: what each process of one runs, ``serve``; ``torchft_world`` starts and watches them.

A replica trains until the clock that the file ``stop`` of its folder names, writes a line of JSON after each step to
``<name>.log``, and ends with a line of digests. ``ready`` files hold the first replicas together, so that they start as
one. Of a replica of several ranks the first has its name, the others ``<name>.<rank>``."""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import deslo_plugin
from deslo_plugin.checkpoint.replica_mean import whole
from deslo_plugin.checks.module_wrappers import bare
from deslo_plugin.comm.consistency import digests
from deslo_plugin.kernels.local_tensors import local

os.environ.setdefault("RUST_LOG", "error")  # what the lighthouse writes; read when torchft is imported
from torchft import Manager, ProcessGroupGloo
from torchft._torchft import LighthouseServer

WARM_UP = 20
KEPT: list[Any] = []  # stores live as long as the process
LONGEST = 8  # no period is longer, and all divide it


def lighthouse(least: int) -> LighthouseServer:
    """``least`` replicas form a quorum."""
    return LighthouseServer(bind="[::]:0", min_replicas=least, join_timeout_ms=20_000, heartbeat_timeout_ms=1000)


def join_replica(job: dict[str, Any]) -> int:
    """This process becomes a rank of its replica; the port of the store that its managers have."""
    rank, ranks, folder = job["rank"], job["ranks"], Path(job["folder"])
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    if ranks == 1:
        KEPT.append(store)
        return store.port
    met = f"file://{folder / job['name']}.{job['life']}"
    dist.init_process_group("gloo", init_method=met, rank=rank, world_size=ranks, timeout=timedelta(seconds=20))
    port = torch.tensor([store.port if store else 0])
    dist.broadcast(port, src=0)
    KEPT.append(store)
    return int(port)


def manager_of(job: dict[str, Any], port: int) -> Manager:
    manager = Manager(
        ProcessGroupGloo(timeout=timedelta(seconds=job["timeout_s"])),
        None,
        None,
        min_replica_size=job["least"],
        use_async_quorum=False,
        init_sync=False,
        timeout=timedelta(seconds=10),
        rank=job["rank"],
        world_size=job["ranks"],
        store_addr="localhost",
        store_port=port,
        lighthouse_addr=job["lighthouse"],
        hostname="localhost",
        replica_id=job["name"],
    )
    return manager


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    """``model`` on the ranks of a replica."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind != "bare":
        size = dist.get_world_size()
        shape, names = ((2, size // 2), ("replicate", "shard")) if kind == "hsdp" else ((size,), ("shard",))
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model


def optimizer_of(job: dict[str, Any], model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    if job.get("stock"):
        return torch.optim.AdamW(model.parameters(), lr=1e-2), job["config"]
    return deslo_plugin.DesLoc(model.parameters(), job["config"]), None


def die_inside_an_average(manager: Manager, doom: Path) -> None:
    """Kills this process once there is a file ``doom`` and a first chunk of an average is sent, but not the second."""
    inner, chunks = manager.allreduce, []

    def allreduce(tensor: torch.Tensor, **options: Any) -> Any:
        if tensor.ndim == 2:  # the roll call: an event begins
            chunks.clear()
        elif len(chunks) == 1 and doom.exists():
            doom.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            chunks.append(tensor)
        return inner(tensor, **options)

    manager.allreduce = allreduce


def note_means(averaging: Any, means_of: dict[str, str], rank: int) -> None:
    """From now on ``means_of`` gets a digest of every mean that is written on this ``rank`` of a replica, by step,
    state and fragment."""
    inner = averaging.receive

    def receive(cohort: Any, states: Any, means: Any) -> None:
        for name, mean in means.items():
            means_of[f"{cohort.steps} {name} {cohort.fragment} {rank}"] = str(
                digests((str(index), tensor) for index, tensor in enumerate(mean))
            )
        inner(cohort, states, means)

    averaging.receive = receive


def states(attachment: Any, model: nn.Module, scheduler: Any) -> dict[str, str]:
    """A digest of everything that replicas must have alike after an average."""
    optimizer = attachment.optimizer.state_dict()
    tensors = {f"{i}.{name}": value for i, each in optimizer["state"].items() for name, value in each.items()}
    clock = {"lr": str(scheduler.get_last_lr()), "scheduled": str(scheduler.last_epoch), "steps": str(attachment.steps)}
    named = {**model.state_dict(), **tensors}
    return digests(zip(named, local(list(named.values())))) | clock


def observed(job: dict[str, Any], model: nn.Module, own: dict[str, str]) -> dict[str, Any]:
    """Digests of the whole parameters of this replica, and of their last average; at the first time of asking replica
    "a" saves, and gives its ``own`` states."""
    names = dict(bare(model).named_parameters())
    with torch.no_grad():
        mine = digests((name, whole(param.detach())) for name, param in names.items())
        last = deslo_plugin.averaged_state_dict(model, as_trained=True)
    found = {"own": mine, "last": digests((name, last[name]) for name in names)}
    saved = Path(job["folder"]) / "saved"
    if job["name"] == "a" and not saved.exists():
        dist.barrier()
        deslo_plugin.save(saved, model, mode=job["mode"], extra={"by": job["name"]})
        found["saved"] = own
    return found


def train(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    folder, name = Path(job["folder"]), job["key"]
    port = join_replica(job)
    model = wrapped(job["kind"], net(job.get("seed", 0)))
    optimizer, config = optimizer_of(job, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / WARM_UP))
    manager = manager_of(job, port)
    manager.register_state_dict_fn("scheduler", scheduler.load_state_dict, scheduler.state_dict)
    attachment = deslo_plugin.attach(model, optimizer, config, manager=manager)
    die_inside_an_average(manager, folder / f"{name}.doom")
    means_of: dict[str, str] = {}
    note_means(attachment.averaging, means_of, job["rank"])
    if job.get("load"):
        assert deslo_plugin.load(job["load"], model)["by"] == "a"
        loaded = {"loaded": states(attachment, model, scheduler)}
    (folder / f"{name}.ready").touch()
    while len(list(folder.glob("*.ready"))) < job["together"]:
        time.sleep(0.01)
    time.sleep(0.3)  # until the lighthouse has heard of all of them

    log = (folder / f"{name}.log").open("a")
    truth = net(1).eval()

    def say(**line: Any) -> None:
        print(json.dumps(line | {"time": time.time()}), file=log, flush=True)

    if job.get("load"):
        say(**loaded)
    stop = folder / "stop"
    while not stop.exists() or attachment.steps < int(stop.read_text()):
        shard = torch.Generator().manual_seed(1000 * attachment.steps + sum(map(ord, name)))
        x = torch.randn(16, 8, generator=shard)
        if attachment.steps == job.get("nan_at"):
            x *= float("nan")
        loss = nn.functional.mse_loss(model(x), truth(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        say(
            steps=attachment.steps,
            loss=loss.item(),
            refused=attachment.stats.refused_averages,
            replicas=attachment.topology.replicas,
            params=attachment.stats.events["params"],
            means=means_of,
        )
        means_of.clear()
        if attachment.steps in job.get("observe", ()):
            say(at=attachment.steps, **observed(job, model, states(attachment, model, scheduler)))
        time.sleep(job["pace"])

    optimizer.zero_grad()
    if not job.get("stock"):
        optimizer.step()  # parameters without a gradient only age: what flies lands on all alike
    say(done=states(attachment, model, scheduler))
    time.sleep(1.0)  # the others may still be reading from this one


def serve(job: dict[str, Any]) -> None:
    """Trains; ends with 3 after a ``ConfigError``, 4 after a ``NonFiniteError``, 1 after any other, said in
    ``<name>.err``."""
    os.dup2(os.open(Path(job["folder"]) / f"{job['key']}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        train(job)
        code = 0
    except Exception as error:
        traceback.print_exc()
        code = {deslo_plugin.ConfigError: 3, deslo_plugin.NonFiniteError: 4}.get(type(error), 1)
    sys.stderr.flush()
    os._exit(code)  # torchft's and gloo's threads may abort at exit
