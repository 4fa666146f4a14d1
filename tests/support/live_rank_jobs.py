"""What four ranks of one replica that comes and goes are asked, with managers that only are looked at."""

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import deslo_plugin
from deslo_plugin.frameworks.live_state import Replica
from deslo_plugin.kernels.local_tensors import local


class Idle:
    """What ``attach`` looks at in the manager of this rank before it trains."""

    _use_async_quorum, _init_sync, _client = False, False, None

    def __init__(self) -> None:
        self._group_world_size, self._group_rank = dist.get_world_size(), dist.get_rank()

    def register_state_dict_fn(self, key: str, load: Callable[..., Any], save: Callable[..., Any]) -> None:
        pass


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def bare() -> nn.Module:
    return net(0)


def ddp_of_two() -> nn.Module:
    group, _ = dist.new_subgroups(group_size=2)
    return DistributedDataParallel(net(0), process_group=group)


def sharded_over_two() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "shard"))
    return fully_shard(net(0), mesh=mesh["shard"])


def one_left_out() -> nn.Module:
    model = net(0)
    fully_shard(model[3], mesh=init_device_mesh("cpu", (4,)))
    return model


def other_buffers() -> nn.Module:
    return fully_shard(nn.Sequential(net(0), Scaled(dist.get_rank())), mesh=init_device_mesh("cpu", (4,)))


class Scaled(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))


def refused(make: Callable[[], nn.Module]) -> str:
    model = make()
    optimizer = deslo_plugin.DesLoc(model.parameters())
    try:
        deslo_plugin.attach(model, optimizer, manager=Idle())
    except deslo_plugin.ConfigError as error:
        return str(error)
    return "attached"


def takes_over_hsdp(stock: bool) -> bool:
    """Whether a replica becomes another one by what that one gives, sent as a manager sends it."""
    replicas = []
    for seed in (1, 2):
        model = net(seed)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        config: dict[str, Any] = {"deslo": {"sync_every": {"params": 4, "exp_avg": 8, "exp_avg_sq": 8}}}
        if stock:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        else:
            optimizer = deslo_plugin.DesLoc(model.parameters(), lr=1e-2)
        model(torch.randn(4, 8)).sum().backward()
        if stock:
            optimizer.step()
        attachment = deslo_plugin.attach(model, optimizer, config if stock else None, manager=Idle())
        for state in optimizer.state.values():
            for value in local([each for each in state.values() if each.ndim]):
                value.normal_()
        replicas.append((model, optimizer, Replica(model, attachment.averaging, attachment.config, 4)))
    (given, its, giver), (taking, own, taker) = replicas
    sent = io.BytesIO()
    torch.save(giver.state(), sent)
    sent.seek(0)
    state = torch.load(sent, weights_only=True)
    taker.refuse_other(state)
    taker.take_over(state)
    pairs = list(zip(given.state_dict().values(), taking.state_dict().values()))
    for left, right in zip(its.state.values(), own.state.values()):
        pairs += [(left[name], right[name]) for name in left]
    return all(torch.equal(*local([left, right])) for left, right in pairs) and len(pairs) > 20
