"""Models and optimizers that cannot be attached: refused on every rank, with the way that works."""

import logging
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deslo_plugin
from tests.support.attaching import DDP, Inside, adamw, config, error_of, heard
from tests.support.jobs import net
from tests.support.torch_jobs import mesh_of
from tests.support.worlds import Processes


def _fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return model, adamw(model)


def _zero_redundancy(model):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return DDP(model), ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2)


def _post_local_sgd(model):
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    return model, PostLocalSGDOptimizer(adamw(model), PeriodicModelAverager(period=4))


def _replicated(model):
    from torch.distributed._composable.replicate import replicate

    return replicate(model), adamw(model)


def _in_backward(model):
    from torch.distributed.optim import _apply_optimizer_in_backward

    optimizer = adamw(model)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 1e-2})
    return model, optimizer


def _sync_batch_norm(model):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    return model, adamw(model)


def _sharded_twice(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh_of((2, 2), ("replicate", "shard"))["shard"])
    return Inside(model[0], DDP(model[2])), adamw(model)


class DistributedFusedAdam(torch.optim.Adam):
    """The name of one that shards its states."""


REFUSED = {
    "FSDP1": (_fsdp1, "FullyShardedDataParallel.*fully_shard"),
    "ZeroRedundancyOptimizer": (_zero_redundancy, "ZeroRedundancyOptimizer.*fully_shard"),
    "PostLocalSGDOptimizer": (_post_local_sgd, "PostLocalSGDOptimizer.*averages parameters by itself"),
    "replicate": (_replicated, r"replicate\(\).*DistributedDataParallel"),
    "optimizer in backward": (_in_backward, "stepped in the backward"),
    "SyncBatchNorm": (
        _sync_batch_norm,
        "attach.model. 1: expected SyncBatchNorm over the ranks of one replica.*use BatchNorm",
    ),
    "DDP beside FSDP2": (_sharded_twice, "expected DDP or fully_shard, got both"),
    "apex": (lambda model: (model, DistributedFusedAdam(model.parameters())), "DistributedFusedAdam.*shards states"),
    "a list of models": (lambda model: ([model], adamw(model)), "expected a torch.nn.Module, got list"),
    "no optimizer": (lambda model: (model, object()), "expected a torch.optim.Optimizer, got object"),
}


def refused() -> dict[str, str]:
    """By kind, the error of attaching it."""
    errors = {}
    for kind, (build, _) in REFUSED.items():
        model, optimizer = build(net())
        errors[kind] = error_of(lambda: deslo_plugin.attach(model, optimizer, config(replica_size=1)))
        assert not hasattr(optimizer, "deslo")
    return errors


def test_what_shards_or_communicates_by_itself_is_refused_on_every_rank(four):
    for errors in four().run(refused):
        for kind, (_, message) in REFUSED.items():
            assert re.search(f"^ConfigError: .*{message}", errors[kind]), errors[kind]


def refused_on_one() -> str:
    model = net()
    optimizer = adamw(model) if dist.get_rank() != 2 else DistributedFusedAdam(model.parameters())
    return error_of(lambda: deslo_plugin.attach(model, optimizer, config()))


def test_what_one_rank_alone_may_not_attach_is_refused_on_all(four):
    assert all("DistributedFusedAdam" in error and "[2]" in error for error in four().run(refused_on_one))


def deepspeed_by_hand(stage: int) -> list[str]:
    """attach() called with an engine, its module, and the optimizers around and in it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        },
    )
    try:
        return [
            error_of(lambda: deslo_plugin.attach(target, optimizer, config()))
            for target in (engine, engine.module)
            for optimizer in (engine.optimizer, engine.basic_optimizer)
        ]
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_deepspeed_engine_is_sent_to_the_two_blocks_of_its_json(four, stage):
    for errors in four().run(deepspeed_by_hand, stage):
        assert all("the two blocks" in error and "in the DeepSpeed JSON" in error for error in errors), errors


def plain_parts(kind: str) -> str:
    """Other values on each rank of a replica, the same in all replicas: experts, or tensor parallelism by hand."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    mesh = mesh_of((2, 2), ("replicate", "shard"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.add_(mesh.get_local_rank("shard"))
    ignored = {model[0].weight}
    if kind == "DTensor":
        model[0].weight = nn.Parameter(DTensor.from_local(model[0].weight.detach(), mesh["shard"], [Shard(0)]))
        ignored = {model[0].weight}
    if kind != "by hand":
        fully_shard(model, mesh=mesh["shard"], ignored_params=ignored)
    return error_of(lambda: deslo_plugin.attach(model, adamw(model), config(), mesh=mesh))


def test_parts_in_plain_tensors_are_refused_and_dtensors_are_not(four):
    for kind in ("by hand", "experts"):
        for error in four().run(plain_parts, kind):
            assert re.search(
                "parameter 0.weight: expected one value on the ranks of a replica, or a DTensor, got another on "
                "rank.s. .1, 3.; make it a DTensor",
                error,
            )
    assert four().run(plain_parts, "DTensor") == ["no error"] * 4


def beside_fsdp() -> list[str]:
    from torch.distributed.fsdp import fully_shard

    mesh, model = mesh_of((2, 2), ("replicate", "shard")), net()
    fully_shard(model[2], mesh=mesh["shard"])
    with heard() as lines:
        deslo_plugin.attach(model, adamw(model), config(), mesh=mesh)
    return lines


def test_trained_parameters_beside_fsdp_are_named(four):
    lines, *_ = four().run(beside_fsdp)
    assert sum("0.weight, 0.bias are trained and not sharded" in line for line in lines) == 1


def stages() -> int:
    """A stage of a pipeline that is attached by its own group of replicas: a world of its own."""
    mesh = mesh_of((2, 2), ("replicate", "stage"))
    stage = nn.Linear(6, 3) if mesh.get_local_rank("stage") else nn.Linear(3, 6)
    group = mesh["replicate"].get_group()
    return deslo_plugin.attach(stage, adamw(stage), config(), process_group=group).topology.replicas


def test_stages_of_a_pipeline_may_be_worlds_of_their_own(tmp_path):
    world = Processes(4, tmp_path)  # its ranks are in equally many groups, which others may not have left behind
    try:
        assert world.run(stages) == [2] * 4
    finally:
        world.close()
