"""What people attach: models and optimizers in every wrapper, ranks that never seeded, attachments without effect."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import deslo_plugin
from deslo_plugin.attachment import attachment_of
from deslo_plugin.checkpoint import resharding
from tests.support.attaching import DDP, Inside, adamw, config, error_of, train
from tests.support.jobs import net
from tests.support.torch_jobs import mesh_of, whole


class _FabricModule(nn.Module):
    """As Lightning Fabric's: both what runs and what the user wrote."""

    def __init__(self, forward_module: nn.Module, original: nn.Module):
        super().__init__()
        self._forward_module, self._original_module = forward_module, original

    def forward(self, inputs):
        return self._forward_module(inputs)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_parts(model: nn.Sequential) -> nn.Module:
    return Inside(DistributedDataParallel(model[0]), nn.Tanh(), DistributedDataParallel(model[2]))


WRAPPED = {
    "compiled": compiled,
    "compiled(DDP)": lambda model: compiled(DDP(model)),
    "DDP(compiled)": lambda model: DDP(compiled(model)),
    "DataParallel": DataParallel,
    "DDP inside": lambda model: Inside(DDP(model)),
    "two DDPs inside": in_parts,
    "Fabric": lambda model: _FabricModule(DDP(model), model),
}


def wrapped(kind: str) -> dict:
    """Trained as it was wrapped: apart after 2 steps, one after 3, and in between no way around the guard."""
    inner = net()
    model = WRAPPED[kind](inner)
    optimizer = adamw(model)
    attachment = deslo_plugin.attach(model, optimizer, config(replica_size=1))
    train(model, optimizer, range(2))
    apart = [whole(p) for p in inner.parameters()]
    levels = [model, inner, inner[0], *(module for module in model.modules() if isinstance(module, DDP))]
    refusals = [error_of(level.state_dict) for level in levels]
    with deslo_plugin.local_state_dict():
        own = len(inner.state_dict())
    names = sorted(deslo_plugin.averaged_state_dict(model))
    train(model, optimizer, range(2, 3))
    return {
        "apart": apart,
        "one": [whole(p) for p in inner.parameters()],
        "refusals": refusals,
        "own": own,
        "names": names,
        "replicas": attachment.topology.replicas,
        "failed": attachment.stats.failed_checks,
    }


@pytest.fixture(scope="module")
def plain(four):
    return four().run(_bare)


def _bare() -> list:
    model = net()
    optimizer = adamw(model)
    deslo_plugin.attach(model, optimizer, config())
    train(model, optimizer, range(2))
    apart = [whole(p) for p in model.parameters()]
    train(model, optimizer, range(2, 3))
    return [apart, [whole(p) for p in model.parameters()]]


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_trains_as_the_bare_one_and_every_level_is_guarded(four, plain, kind):
    for (apart, one), result in zip(plain, four().run(wrapped, kind)):
        assert all(map(torch.equal, apart, result["apart"])) and all(map(torch.equal, one, result["one"]))
        assert all(
            "state_dict(): expected one model, got one of 4 replicas" in refusal for refusal in result["refusals"]
        )
        assert result["own"] == 4 and result["failed"] == 0 and result["replicas"] == 4
        if kind not in ("DDP inside", "two DDPs inside"):
            assert result["names"] == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_the_torch_before_2_12_has_one_param_group_for_each_module(monkeypatch):
    class Older(nn.Module):
        def _get_fsdp_state(self):
            return type("State", (), {"_fsdp_param_group": self.group})

    sharded, empty = Older(), Older()
    sharded.group, empty.group = "group", None
    monkeypatch.setattr(resharding, "FSDPModule", Older)
    assert list(resharding.param_groups(nn.Sequential(sharded, empty))) == ["group"]


def in_two_dimensions(kind: str) -> dict:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    if kind == "hsdp x tp":
        mesh = mesh_of((2, 1, 2), ("dp_replicate", "dp_shard", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])
    else:
        mesh = mesh_of((2, 2), ("replicate", "shard"))
        fully_shard(model[0], mesh=mesh["shard"])
        fully_shard(model[2], mesh=mesh["replicate", "shard"])
    optimizer = adamw(model)
    deslo_plugin.attach(model, optimizer, config(), mesh=mesh)
    train(model, optimizer, range(4), seat=dist.get_rank() // 2)
    return {name: whole(param) for name, param in model.named_parameters()}


@pytest.mark.parametrize("kind", ["hsdp x tp", "two meshes"])
def test_models_on_more_than_one_mesh_train_as_replicas_of_one_process(four, kind):
    replicas = [net(), net()]
    optimizers = [adamw(model) for model in replicas]
    for step in range(4):
        for seat, (model, optimizer) in enumerate(zip(replicas, optimizers)):
            train(model, optimizer, range(step, step + 1), seat)
        if step == 2:
            for mine, theirs in zip(*(model.parameters() for model in replicas)):
                states = [
                    [p.detach(), *(o.state[p][name] for name in ("exp_avg", "exp_avg_sq"))]
                    for p, o in zip((mine, theirs), optimizers)
                ]
                for a, b in zip(*states):
                    b.copy_(a.copy_((a + b) / 2))
    for rank, result in enumerate(four().run(in_two_dimensions, kind)):
        for name, param in replicas[rank // 2].named_parameters():
            assert torch.allclose(result[name], param.detach().flatten(), atol=1e-6), (name, rank)


def test_an_attachment_is_found_by_the_model_in_its_wrappers_and_by_the_optimizer():
    model = net()
    optimizer = adamw(model)
    attachment = deslo_plugin.attach(model, optimizer, config())
    assert all(attachment_of(target) is attachment for target in (model, DataParallel(model), optimizer))
    assert all(attachment_of(target) is None for target in (copy.deepcopy(model), model[0], adamw(net()), None))
