"""A script's steps and what it does between them, one at a time, on real ranks: what tests of sequences play."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.device import DEVICE

RANKS, LR, BETA1, BETA2, EPS, CLIP = 4, 1e-2, 0.9, 0.95, 1e-3, 0.05
WORDS, WIDTH, OUTPUTS = 8, 4, 2


class Net(nn.Module):
    """Rows that a batch may leave out, a matrix that is frozen, a scalar (which FSDP2 does not take), and a head that
    joins later."""

    def __init__(self, scale: float | list[float] = 1.5):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.rows = nn.Parameter(torch.randn(WORDS, WIDTH, generator=generator))
        self.matrix = nn.Parameter(torch.randn(OUTPUTS, WIDTH, generator=generator))
        self.scale = nn.Parameter(torch.tensor(scale))
        self.late = nn.Parameter(torch.randn(OUTPUTS, WIDTH, generator=generator), requires_grad=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.scale * (self.rows[words] @ (self.matrix + self.late).T)


def loss_of(model: Callable[[Tensor], Tensor], rank: int, step: int, micro: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(10_000 * rank + 10 * step + micro)
    words = torch.randint(0, WORDS, (3,), generator=generator)
    target = torch.randn(3, OUTPUTS, generator=generator)
    output = model(words)
    return (output - target.to(output.device, dtype)).square().mean()


class Job:
    """One rank's part of a sequence, on the real thing."""

    def __init__(self, wrap: str, periods: dict[str, int | None], deslo: dict[str, Any], stock: bool, folder: str):
        import deslo_plugin

        self.net, self.step, self.folder, self.kept, self.saved = (
            Net([1.5] if wrap == "fsdp" else 1.5),
            0,
            Path(folder),
            None,
            0,
        )
        self.rank, self.deslo_plugin = dist.get_rank(), deslo_plugin
        self.model, options = self.net, {}
        if wrap == "ddp":
            self.model = DistributedDataParallel(self.net, find_unused_parameters=True)
            deslo = deslo | {"replica_size": 1}
        if wrap == "fsdp":
            options["mesh"] = mesh_of_two_replicas()
            fully_shard(self.net, mesh=options["mesh"]["shard"])
        trained = [self.net.rows, self.net.matrix, self.net.scale]
        adam = {"lr": LR, "betas": [BETA1, BETA2], "eps": EPS}
        if stock:
            self.optimizer = torch.optim.AdamW(trained, **adam, weight_decay=0.0)
            options["config"] = {"deslo": deslo | {"sync_every": periods}}
        else:
            blocks = {"optimizer": {"type": "DesLoc", "params": adam | {"sync_every": periods}}, "deslo": deslo}
            self.optimizer = deslo_plugin.DesLoc(trained, blocks)
        self.attachment = deslo_plugin.attach(self.model, self.optimizer, **options)

    def play(self, action: tuple) -> None:
        what, *details = action
        getattr(self, what.replace(" ", "_"))(*details)

    def train(self, how: str = "plain", skipped: bool = False) -> None:
        if how == "evaluated":
            with torch.no_grad():
                loss_of(self.model, self.rank, 999, 0, torch.float32)
        for micro in range(micro_batches(how, self.attachment.topology.replica)):
            loss_of(self.model, self.rank, self.step, micro, torch.float32).backward()
        if how == "clipped":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.attachment.skip_step() if skipped else self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def skip(self, who: int) -> None:
        self.train(skipped=replica_of(who, self.attachment.topology.replicas) == self.attachment.topology.replica)

    @torch.no_grad()
    def write(self, how: str, who: int | None) -> None:
        if who is None or replica_of(who, self.attachment.topology.replicas) == self.attachment.topology.replica:
            scribble({name: local(param) for name, param in self.net.named_parameters()}, how)

    def freeze(self, who: int | None = None) -> None:
        if who in (None, self.rank):
            self.net.matrix.requires_grad_(False)

    def join(self, who: int | None = None) -> None:
        if who in (None, self.rank) and not self.net.late.requires_grad:
            self.net.late.requires_grad_(True)
            self.optimizer.add_param_group({"params": [self.net.late]})

    def keep(self) -> None:
        with self.deslo_plugin.local_state_dict():
            self.kept = (
                copy.deepcopy((self.net.state_dict(), self.optimizer.state_dict())),
                self.step,
                len(self.optimizer.param_groups),
            )

    def go_back(self) -> None:
        if self.kept and self.kept[-1] == len(self.optimizer.param_groups):  # torch refuses another number of groups
            (model, optimizer), self.step, _ = copy.deepcopy(self.kept)
            self.net.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)

    def load_optimizer(self, who: int) -> None:
        if who == self.rank:
            with self.deslo_plugin.local_state_dict():
                self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def save_and_load(self, mode: str) -> None:
        self.saved += 1
        path = self.folder / str(self.saved)
        self.deslo_plugin.save(path, self.model, mode=mode)
        self.deslo_plugin.load(path, self.model)

    def average_now(self) -> None:
        self.deslo_plugin.sync_replicas(self.model)

    def states(self) -> dict[str, Tensor]:
        out = {}
        for name, param in self.net.named_parameters():
            for state, value in {"params": param, **self.optimizer.state.get(param, {})}.items():
                if state in ("params", "exp_avg", "exp_avg_sq"):
                    out[f"{state} of {name}"] = (
                        (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
                    )
        return out


def replica_of(rank: int, replicas: int) -> int:
    return rank * replicas // RANKS


def micro_batches(how: str, replica: int) -> int:
    """Replicas may take different numbers; the ranks of one may not, as every forward of FSDP2 gathers over all of
    them."""
    return 1 + (how == "uneven" and replica % 2)


def scribble(params: dict[str, Tensor], how: str) -> None:
    """What a script writes into weights, element by element alike in every sharding."""
    if how == "add":
        params["scale"].add_(0.25)
        params["matrix"].mul_(1.5)
    elif how == "clamp":
        params["rows"].clamp_(-0.5, 0.5)
    else:
        params["rows"].mul_(0.0)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


_meshes: list[Any] = []


def mesh_of_two_replicas() -> Any:
    """One for all jobs of a process: every group keeps threads and sockets."""
    if not _meshes:
        _meshes.append(init_device_mesh(DEVICE.type, (2, RANKS // 2), mesh_dim_names=("replicate", "shard")))
    return _meshes[0]


def played(
    wrap: str, stock: bool, periods: dict, deslo: dict, sequence: list[tuple], folder: str
) -> tuple[str, dict[str, Tensor]]:
    """The error that the sequence ends in on this rank, or "", and this replica's states."""
    import logging

    logging.getLogger("deslo_plugin").setLevel(logging.CRITICAL)
    job = Job(wrap, periods, deslo, stock, folder)
    try:
        for action in sequence:
            job.play(action)
        return "", job.states()
    except Exception as error:
        return f"{type(error).__name__}: {error}", {}
