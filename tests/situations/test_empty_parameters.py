"""Parameters that nobody initialised: a model from the meta device whose modules have no ``reset_parameters()``."""

import pytest
import torch.distributed as dist

import deslo_plugin
from tests.support.jobs import engine_for, net
from tests.support.torch_jobs import mesh_of

PERIODS = {"sync_every": {"params": 4}}


def attach_empty(kind: str) -> str:
    model = net()
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=mesh_of((2, 2), ("replicate", "shard"))["shard"])
    last = list(model.parameters())[-1].detach()
    last = last.to_local() if kind == "fsdp" else last
    if kind != "fsdp" or dist.get_rank() % 2:  # of two shards the second alone
        last.view(-1)[-1] = float("nan")
    try:
        if kind.startswith("zero"):
            ds = {"optimizer": {"type": "DesLoc", "params": PERIODS}, "deslo": {"replica_size": 2}}
            with engine_for(ds | {"zero_optimization": {"stage": int(kind[-1])}}, model):
                return "no error"
        optimizer = deslo_plugin.DesLoc(model.parameters(), **PERIODS)
        deslo_plugin.attach(
            model, optimizer, **({"mesh": mesh_of((2, 2), ("replicate", "shard"))} if kind == "fsdp" else {})
        )
    except deslo_plugin.ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind", ["plain", "fsdp", "zero 1", "zero 3"])
def test_nan_before_the_first_step_is_named_on_every_rank(four, kind):
    for error in four().run(attach_empty, kind):
        assert "expected finite numbers before the first step, got NaN or inf; initialise it" in error
