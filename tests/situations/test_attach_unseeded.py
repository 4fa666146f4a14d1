"""Replicas that do not start from the same parameters: ranks that never seeded, and parameters moved by hand."""

import pytest
import torch
import torch.distributed as dist

import deslo_plugin
from tests.support.attaching import DDP, adamw, config, error_of, heard, train
from tests.support.jobs import batch, loss_of, net
from tests.support.torch_jobs import mesh_of, whole


def unseeded(kind: str, initial: str | None = None) -> dict:
    """Every rank draws its own model, and has its own persistent buffer."""
    from torch.distributed.fsdp import fully_shard

    rank, mesh = dist.get_rank(), mesh_of((2, 2), ("replicate", "shard"))
    model, options = net(seed=rank), {}
    model.register_buffer("table", torch.full((3,), float(rank)))
    model.register_buffer("count", torch.tensor(rank))
    model.register_buffer("own", torch.tensor(rank), persistent=False)
    deslo = {} if initial is None else {"initial_params": initial}
    if kind == "mixed fsdp":
        fully_shard(model[2], mesh=mesh["shard"])
        options = {"mesh": mesh}
    elif kind == "fsdp":
        fully_shard(model, mesh=mesh["shard"])
    elif kind == "ddp of a replica":
        model = DDP(model, broadcast_buffers=False)
        with torch.no_grad():
            model.module[0].weight.add_(rank)  # what DDP had made equal
        deslo |= {"replica_size": 2}
    optimizer = adamw(model)
    with heard() as lines:
        error = error_of(lambda: deslo_plugin.attach(model, optimizer, config(**deslo), **options))
    inner = getattr(model, "module", model)
    return {
        "error": error,
        "lines": [line for line in lines if "differed" in line],
        "own": int(inner.own),
        "state": [*map(whole, inner.parameters()), inner.table.clone(), inner.count.clone()],
    }


@pytest.mark.parametrize("kind", ["plain", "ddp of a replica", "fsdp", "mixed fsdp"])
def test_ranks_that_never_seeded_start_from_replica_0_which_is_said_once(four, kind):
    results = four().run(unseeded, kind)
    assert [result["error"] for result in results] == ["no error"] * 4
    for result in results:
        assert all(map(torch.equal, result["state"], results[0]["state"]))
    assert int(results[0]["state"][-1]) == 0 and [result["own"] for result in results] == [0, 1, 2, 3]
    assert "on rank(s) [1, 2, 3]" in " ".join(results[0]["lines"]) and "0.weight" in " ".join(results[0]["lines"])
    assert "initial_params" in results[0]["lines"][0] and not any(result["lines"] for result in results[1:])


def test_check_refuses_and_broadcast_says_nothing(four):
    assert all(
        "initial value of parameter 0.weight" in each["error"] for each in four().run(unseeded, "plain", "check")
    )
    for result in four().run(unseeded, "plain", "broadcast"):
        assert result["error"] == "no error" and not result["lines"] and int(result["state"][-1]) == 0


def deepspeed_unseeded(stage: int, same_data: bool = False) -> list:
    from tests.support.jobs import engine_for, replica_state

    ds = {
        "optimizer": {"type": "DesLoc", "params": {"sync_every": {"params": 4}}},
        "deslo": {"replica_size": 2},
        "zero_optimization": {"stage": stage},
    }
    with engine_for(ds, net(seed=dist.get_rank())) as engine:
        params = [*replica_state(engine, [])["params"].values()]
        for step in range(6):
            engine.backward(loss_of(engine, batch(0 if same_data else dist.get_rank(), step, 0)))
            engine.step()
        return [params, engine.deslo.check()]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_that_never_seeded_start_from_replica_0_under_deepspeed(four, stage):
    results = four().run(deepspeed_unseeded, stage)
    first, _ = results[0]
    assert [found for _, found in results] == [[]] * 4 and all(
        all(map(torch.equal, params, first)) for params, _ in results
    )
    assert torch.equal(first[0].flatten(), net(seed=0)[0].weight.flatten())


def test_the_same_data_on_every_rank_is_seen_under_deepspeed(four):
    for _, (found,) in four().run(deepspeed_unseeded, 2, True):
        assert "all ranks see the same data" in found


def moved_by_hand() -> list[list[str]]:
    model = net()
    optimizer = adamw(model)
    attachment = deslo_plugin.attach(model, optimizer, config())
    found = [attachment.check()]
    with torch.no_grad():
        model[0].weight.add_(1.0 + (dist.get_rank() == 3))
    return [*found, attachment.check(), attachment.check()]


def test_check_sees_parameters_that_moved_without_a_step_and_replicas_that_differ(four):
    for first, second, third in four().run(moved_by_hand):
        assert first == [] and any("without a step" in each for each in second)
        assert any("rank(s) [3] differ from replica 0" in each for each in second) and "without a step" not in third[0]


def late_attach() -> list[str]:
    model = net()
    first, second = torch.optim.AdamW(model[0].parameters()), torch.optim.AdamW(model[2].parameters())
    deslo_plugin.attach(model, first, config())
    train(model, first, range(2))
    errors = [error_of(lambda: deslo_plugin.attach(model, second, config()))]
    deslo_plugin.sync_replicas(model)
    return [*errors, error_of(lambda: deslo_plugin.attach(model, second, config()))]


def test_an_optimizer_that_comes_late_does_not_set_replicas_back(four):
    for error, after in four().run(late_attach):
        assert (
            "attach every optimizer before the first step, or call deslo_plugin.sync_replicas(model)" in error
            and after == "no error"
        )
