"""Jobs with live membership: ``Replicas`` starts, dooms and watches processes, each of which runs ``serve``.

A replica trains until the clock that the file ``stop`` of its folder names, writes a line of JSON after each step to
``<name>.log``, and ends with a line of digests. ``ready`` files hold the first replicas together, so that they start as
one."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore

import deslo_plugin
from deslo_plugin.comm.consistency import digests
from tests.support.worlds import STARTED

os.environ.setdefault("RUST_LOG", "error")  # what the lighthouse writes; read when torchft is imported
from torchft import Manager, ProcessGroupGloo
from torchft._torchft import LighthouseServer

WARM_UP = 20
LONGEST = 8  # no period is longer, and all divide it


def manager_of(job: dict[str, Any]) -> Manager:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        ProcessGroupGloo(timeout=timedelta(seconds=job["timeout_s"])),
        None,
        None,
        min_replica_size=2,
        use_async_quorum=False,
        init_sync=False,
        timeout=timedelta(seconds=10),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=job["lighthouse"],
        hostname="localhost",
        replica_id=job["name"],
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


def note_means(averaging: Any, means_of: dict[str, str]) -> None:
    """From now on ``means_of`` gets a digest of every mean that is written, by step and state."""
    inner = averaging.receive

    def receive(cohort: Any, states: Any, means: Any) -> None:
        for name, mean in means.items():
            means_of[f"{cohort.steps} {name}"] = str(digests((str(index), tensor) for index, tensor in enumerate(mean)))
        inner(cohort, states, means)

    averaging.receive = receive


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
    die_inside_an_average(manager, folder / f"{name}.doom")
    means_of: dict[str, str] = {}
    note_means(attachment.averaging, means_of)
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
        say(
            steps=attachment.steps,
            loss=loss.item(),
            refused=attachment.stats.refused_averages,
            replicas=attachment.topology.replicas,
            params=attachment.stats.events["params"],
            means=means_of,
        )
        means_of.clear()
        time.sleep(job["pace"])

    optimizer.zero_grad()
    if not job.get("stock"):
        optimizer.step()  # parameters without a gradient only age: what flies lands on all alike
    say(done=states(attachment, model, scheduler))
    time.sleep(1.0)  # the others may still be reading from this one


def serve(job: dict[str, Any]) -> None:
    """Trains; ends with 3 after a ``ConfigError``, 4 after a ``NonFiniteError``, 1 after any other, said in
    ``<name>.err``."""
    os.dup2(os.open(Path(job["folder"]) / f"{job['name']}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        train(job)
        code = 0
    except Exception as error:
        traceback.print_exc()
        code = {deslo_plugin.ConfigError: 3, deslo_plugin.NonFiniteError: 4}.get(type(error), 1)
    sys.stderr.flush()
    os._exit(code)  # torchft's and gloo's threads may abort at exit


class Replicas:
    """Replicas of one job, and the lighthouse that they know each other by."""

    def __init__(self, folder: Path, **common: Any) -> None:
        self.folder, self.common, self.processes = folder, common, {}
        self.lighthouse = LighthouseServer(
            bind="[::]:0", min_replicas=2, join_timeout_ms=20_000, heartbeat_timeout_ms=1000
        )

    def start(self, *names: str, **own: Any) -> None:
        for name in names:
            job = {"name": name, "folder": str(self.folder), "lighthouse": self.address, "timeout_s": 3, "pace": 0.01}
            self.processes[name] = STARTED.Process(target=serve, args=(job | self.common | own,), daemon=True)
            self.processes[name].start()

    @property
    def address(self) -> str:
        return f"http://localhost:{self.lighthouse.address().rsplit(':', 1)[1]}"

    def ended(self, *names: str) -> bool:
        return all(not self.processes[name].is_alive() for name in names)

    def error(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()

    def lines(self, name: str) -> list[dict[str, Any]]:
        log = self.folder / f"{name}.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def trained(self, name: str) -> list[dict[str, Any]]:
        """A line for each step of ``name``, over all its lives."""
        return [line for line in self.lines(name) if "loss" in line]

    def clock(self, *names: str) -> int:
        """The step that all of ``names`` have come to."""
        return min(max([0, *(line["steps"] for line in self.trained(name))]) for name in names)

    def back(self, name: str, since: float) -> bool:
        """Whether ``name`` trains again beside two others and has landed an average."""
        return any(
            line["time"] > since and line["params"] >= 1 and line["replicas"] == 3 for line in self.trained(name)[-1:]
        )

    def doom(self, name: str) -> None:
        """``name`` will die inside its next average of several states."""
        (self.folder / f"{name}.doom").touch()

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                said = {path.name: path.read_text()[-1500:] for path in self.folder.glob("*.err")}
                raise AssertionError(f"waited {seconds} s; {said}")
            time.sleep(0.03)

    def finish(self) -> dict[str, Any]:
        """Lets every replica train to one clock and returns what each ends with."""
        stop = max(map(self.clock, self.processes)) // LONGEST * LONGEST + 6 * LONGEST
        (self.folder / "stop.new").write_text(str(stop))
        (self.folder / "stop.new").rename(self.folder / "stop")
        self.wait(lambda: self.ended(*self.processes))
        return {name: self.lines(name)[-1].get("done") for name in self.processes}

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join(timeout=10)
        self.lighthouse.shutdown()
