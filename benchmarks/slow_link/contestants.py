"""Ways to train one GPT on two nodes: without communication between them, synchronously, and with local steps.

All take the same local Adam update with the same kernels (``DesLoc``), so that they differ in communication alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.slow_link.network import ADDRESSES
from deslo_plugin import DesLoc, attach
from deslo_plugin.comm.transport import SingleReplica
from examples.harness.gpt import GPT, GPTConfig

NEVER = 10**9
LIGHTHOUSES: list[Any] = []  # torchft's servers live as long as their process
STORES: list[Any] = []


def local_adam(model: nn.Module) -> DesLoc:
    return DesLoc(model.parameters(), lr=1e-3, sync_every={"params": NEVER}, transport=SingleReplica())


@dataclass(frozen=True)
class Setting:
    """The model, ``sequences`` per rank and step, K: steps between averages of the parameters.

    Peers train with ``optimizer``, which averages nothing; those that can average gradients for the first ``warm_up``
    steps."""

    shape: GPTConfig
    sequences: int
    period: int
    warm_up: int = 0
    optimizer: Callable[[nn.Module], DesLoc] = local_adam


@dataclass
class Running:
    """A contestant that is built. ``payload(t)``: bytes this rank hands to reductions between nodes after t steps;
    ``waited()``: seconds that its own meter has counted so far, where it has one."""

    model: nn.Module
    optimizer: Any
    payload: Callable[[int], int]
    after: Callable[[], object] = lambda: None
    waited: Callable[[], float] = lambda: 0.0

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        self.model(tokens, targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after()


@dataclass(frozen=True)
class Contestant:
    """``per_node`` ranks on each node; ``longest``: its longest period in units of K, 0 if it communicates at every
    step.

    ``silent``: never communicates between nodes. ``hides``: its averages travel while a step is computed. ``needs``: a
    module that must be installed.
    """

    title: str
    build: Callable[[Setting], Running] = field(repr=False)
    longest: int
    per_node: int = 1
    silent: bool = False
    hides: bool = False
    ours: bool = False
    needs: str = "torch"

    @property
    def installed(self) -> bool:
        return find_spec(self.needs) is not None


def nbytes(model: nn.Module) -> int:
    """Of this rank's part of all parameters."""
    return sum(getattr(param, "to_local", lambda p=param: p)().nbytes for param in model.parameters())


def every(period: int, model: nn.Module) -> Callable[[int], int]:
    size = nbytes(model)
    return lambda steps: size if steps % period == 0 else 0


def alone(setting: Setting) -> Running:
    model = GPT(setting.shape)
    return Running(model, setting.optimizer(model), lambda steps: 0)


def ddp(setting: Setting) -> Running:
    model = wrapped(setting)
    return Running(model, setting.optimizer(model), every(1, model))


def wrapped(setting: Setting) -> DistributedDataParallel:
    """Without the broadcast of buffers before each forward: the model's are tables that never change."""
    return DistributedDataParallel(GPT(setting.shape), broadcast_buffers=False)


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def sharded(setting: Setting, on: DeviceMesh) -> nn.Module:
    model = GPT(setting.shape)
    for block in model.blocks:
        fully_shard(block, mesh=on)
    return fully_shard(model, mesh=on)


def fsdp_alone(setting: Setting) -> Running:
    model = sharded(setting, mesh()["shard"])
    return Running(model, setting.optimizer(model), lambda steps: 0)


def hsdp(setting: Setting) -> Running:
    model = sharded(setting, mesh())
    return Running(model, setting.optimizer(model), every(1, model))


def accelerate_local_sgd(setting: Setting) -> Running:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator, model = Accelerator(cpu=True), GPT(setting.shape)
    model, optimizer = accelerator.prepare(model, setting.optimizer(model))
    local_sgd = LocalSGD(accelerator, model, local_sgd_steps=setting.period).__enter__()
    return Running(model, optimizer, every(setting.period, model), after=local_sgd.step)


def post_local_sgd(setting: Setting) -> Running:
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model = wrapped(setting)
    inside, _ = dist.new_subgroups(group_size=1)
    model.register_comm_hook(PostLocalSGDState(None, inside, start_localSGD_iter=setting.warm_up), post_localSGD_hook)
    averages = every(setting.period, model)
    optimizer = PostLocalSGDOptimizer(setting.optimizer(model), PeriodicModelAverager(setting.period, setting.warm_up))
    return Running(model, optimizer, lambda steps: averages(steps - 1))  # it averages after steps 1, K + 1, ...


def torchft_local_sgd(setting: Setting) -> Running:
    from torchft.local_sgd import LocalSGD

    model = GPT(setting.shape)
    optimizer = setting.optimizer(model)
    LocalSGD(torchft_manager("local-sgd"), model, optimizer, sync_every=setting.period).__enter__()
    return Running(model, optimizer, every(setting.period, model))


def torchft_diloco(setting: Setting) -> Running:
    from torchft.local_sgd import DiLoCo

    model = GPT(setting.shape)
    inner, outer = setting.optimizer(model), torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    DiLoCo(torchft_manager("diloco"), [model], inner, outer, sync_every=setting.period).__enter__()
    return Running(model, inner, every(setting.period, model))


def torchft_manager(name: str) -> Any:
    """A replica of one rank, with a lighthouse for each contestant on the first node."""
    from torchft import Manager, ProcessGroupGloo
    from torchft._torchft import LighthouseServer

    rank, address = dist.get_rank(), ADDRESSES[dist.get_rank()]
    where: list[Any] = [None]
    if rank == 0:
        lighthouse = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=10_000)
        LIGHTHOUSES.append(lighthouse)
        where = [f"http://{address}:{lighthouse.address().rsplit(':', 1)[1]}"]
    dist.broadcast_object_list(where)
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    return Manager(
        ProcessGroupGloo(),
        None,
        None,
        min_replica_size=2,
        use_async_quorum=False,
        init_sync=False,
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        lighthouse_addr=where[0],
        hostname=address,
        replica_id=f"{name}-{rank}",
    )


def ours(
    periods: dict[str, int],
    overlap: bool,
    momentum: dict[str, float],
    shard: bool,
    transport: str = "device",
    fragments: int | str = 1,
    wire: str = "float32",
) -> Callable[[Setting], Running]:
    """``periods`` in units of K."""

    def build(setting: Setting) -> Running:
        model = sharded(setting, mesh()["shard"]) if shard else wrapped(setting)
        sync_every = {state: units * setting.period for state, units in periods.items()}
        params = {"lr": 1e-3, "sync_every": sync_every} | ({"momenta": [momentum]} if momentum else {})
        optimizer = DesLoc(
            model.parameters(),
            {
                "optimizer": {"params": params},
                "deslo": {
                    "overlap_comm": overlap,
                    "replica_size": "auto" if shard else 1,
                    "transport": transport,
                    "fragments": fragments,
                    "wire_dtype": wire,
                },
            },
        )
        attachment = attach(model, optimizer, mesh=mesh() if shard else None)
        plan, meter = attachment.plan, attachment.stats
        return Running(
            model, optimizer, lambda steps: sum(plan.bytes_at(steps).values()), waited=lambda: meter.seconds_exposed
        )

    return build


def _ours(
    name: str, title: str, periods: dict[str, int], momentum: dict[str, float] | None = None, *, shard: bool = False
) -> dict[str, Contestant]:
    """With overlap, in turn (computing, then communicating), and in as many fragments as the period has steps, in
    float32 and int8."""
    streamed = {
        f"{name}-in-{short}": Contestant(
            f"{title}, in {said}",
            ours(periods, True, momentum or {}, shard, fragments="auto", wire=wire),
            longest=max(periods.values()),
            per_node=1 + shard,
            hides=True,
            ours=True,
        )
        for short, said, wire in (("fragments", "fragments", "float32"), ("int8", "int8 fragments", "int8"))
    }
    return streamed | {
        name + ("" if overlap else "-in-turn"): Contestant(
            title + ("" if overlap else ", in turn"),
            ours(periods, overlap, momentum or {}, shard),
            longest=max(periods.values()),
            per_node=1 + shard,
            hides=overlap,
            ours=True,
        )
        for overlap in (True, False)
    }


TOGETHER = {"params": 1, "exp_avg": 1, "exp_avg_sq": 1}
APART = {"params": 1, "exp_avg": 3, "exp_avg_sq": 6}
CONTESTANTS: dict[str, Contestant] = {
    "alone": Contestant("no communication", alone, 1, silent=True),
    "alone-again": Contestant("the same again", alone, 1, silent=True),
    "ddp": Contestant("DDP", ddp, 0),
    "accelerate": Contestant("Accelerate LocalSGD", accelerate_local_sgd, 1, needs="accelerate"),
    "post-local-sgd": Contestant("torch PostLocalSGD", post_local_sgd, 1),
    "torchft-local-sgd": Contestant("torchft LocalSGD", torchft_local_sgd, 1, needs="torchft"),
    "torchft-diloco": Contestant("torchft DiLoCo", torchft_diloco, 1, needs="torchft"),
    **_ours("local-adam", "Local Adam", TOGETHER),
    **_ours("mt-dao", "MT-DAO", TOGETHER, {"beta": 0.97, "weight": 0.9}),
    **_ours("des-loc", "DES-LOC", APART),
    "des-loc-host": Contestant(
        "DES-LOC, through host memory", ours(APART, True, {}, False, "host"), longest=6, hides=True, ours=True
    ),
    "fsdp-alone": Contestant("no communication, FSDP2", fsdp_alone, 1, per_node=2, silent=True),
    "fsdp-alone-again": Contestant("the same again", fsdp_alone, 1, per_node=2, silent=True),
    "hsdp": Contestant("FSDP2-HSDP", hsdp, 0, per_node=2),
    **_ours("des-loc-fsdp", "DES-LOC, FSDP2", APART, shard=True),
}
FLOORS = {1: "alone", 2: "fsdp-alone"}  # ranks per node -> what its contestants are compared with
