"""One replica of a job with live membership, a process of its own: ``serve``, given what it is to be.

It trains until the clock that the file ``stop`` of its folder names, writes a line of JSON after each step to ``<name>.log``,
and ends with a line of digests. ``ready`` files hold the first replicas together, so that they start as one.
"""

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
from torch import nn
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo

import deslo_plugin
from deslo_plugin.agreement import digests

WARM_UP = 20


def manager_of(job: dict[str, Any]) -> Manager:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        ProcessGroupGloo(timeout=timedelta(seconds=job["timeout_s"])), None, None, min_replica_size=2, use_async_quorum=False,
        init_sync=False, timeout=timedelta(seconds=10), rank=0, world_size=1, store_addr="localhost", store_port=store.port,
        lighthouse_addr=job["lighthouse"], hostname="localhost", replica_id=job["name"],
    )
    manager.own_store = store  # lives as long as it
    return manager


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))


def optimizer_of(job: dict[str, Any], model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    if job.get("stock"):
        return torch.optim.AdamW(model.parameters(), lr=1e-2), job["config"]
    return deslo_plugin.DesLoc(model.parameters(), job["config"]), None


def die_inside_an_average(manager: Any, job: dict[str, Any], attachment: Any) -> None:
    """Kills this process once it has sent a first chunk after step ``dies_at``, and not the others."""
    inner, chunks = manager.allreduce, []

    def allreduce(tensor: torch.Tensor, **options: Any) -> Any:
        if attachment.steps == job["dies_at"] and tensor.ndim == 1:
            chunks.append(tensor)
            if len(chunks) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return inner(tensor, **options)

    manager.allreduce = allreduce


def states(attachment: Any, model: nn.Module, scheduler: Any) -> dict[str, str]:
    """A digest of everything that replicas must have alike after an average."""
    optimizer = attachment.optimizer.state_dict()
    tensors = {f"{i}.{name}": value for i, each in optimizer["state"].items() for name, value in each.items()}
    clock = {"lr": str(scheduler.get_last_lr()), "scheduled": str(scheduler.last_epoch), "steps": str(attachment.steps)}
    return digests({**model.state_dict(), **tensors}.items()) | clock


def train(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    folder, name = Path(job["folder"]), job["name"]
    model = net(job.get("seed", 0))
    optimizer, config = optimizer_of(job, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / WARM_UP))
    manager = manager_of(job)
    manager.register_state_dict_fn("scheduler", scheduler.load_state_dict, scheduler.state_dict)
    attachment = deslo_plugin.attach(model, optimizer, config, manager=manager)
    if "dies_at" in job:
        die_inside_an_average(manager, job, attachment)
    (folder / f"{name}.ready").touch()
    while len(list(folder.glob("*.ready"))) < job["together"]:
        time.sleep(0.01)
    time.sleep(0.3)  # until the lighthouse has heard of all of them

    log = (folder / f"{name}.log").open("a")
    truth = net(1).eval()

    def say(**line: Any) -> None:
        print(json.dumps(line | {"time": time.time()}), file=log, flush=True)

    stop = folder / "stop"
    while not stop.exists() or attachment.steps < int(stop.read_text()):
        shard = torch.Generator().manual_seed(1000 * attachment.steps + sum(map(ord, name)))
        x = torch.randn(16, 8, generator=shard)
        if (attachment.steps, name) == (job.get("nan_at"), job["name"]):
            x *= float("nan")
        loss = nn.functional.mse_loss(model(x), truth(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        say(steps=attachment.steps, loss=loss.item(), refused=attachment.meter.refused_averages,
            replicas=attachment.topology.replicas, params=attachment.meter.events["params"], lr=scheduler.get_last_lr()[0])
        time.sleep(job["pace"])

    optimizer.zero_grad()
    if not job.get("stock"):
        optimizer.step()  # parameters without a gradient only age: what flies lands on all alike
    say(done=states(attachment, model, scheduler))
    time.sleep(1.0)  # the others may still be reading from this one


def serve(job: dict[str, Any]) -> None:
    """Trains; ends with 3 after a ``ConfigError``, 4 after a ``NonFiniteError``, 1 after any other, said in ``<name>.err``."""
    os.dup2(os.open(Path(job["folder"]) / f"{job['name']}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        train(job)
        code = 0
    except Exception as error:
        traceback.print_exc()
        code = {deslo_plugin.ConfigError: 3, deslo_plugin.NonFiniteError: 4}.get(type(error), 1)
    sys.stderr.flush()
    os._exit(code)  # torchft's and gloo's threads may abort at exit
