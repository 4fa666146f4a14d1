"""``state_dict()`` on rank 0 alone: the last average, and how old it is."""

import copy

import pytest
import torch
import torch.distributed as dist

from tests.support import torch_jobs
from tests.support.checkpoint_jobs import Job
from tests.support.savers import EVERY_4, Lines, config_of, module_of


def rank_0_alone(kind, config):
    """On rank 0 alone after step 6: how far state_dict() is from the mean of what all replicas had after step 4, and
    what it says."""
    job = Job(kind, config)
    job.train(range(4))
    expected = {}
    for name, param in module_of(job.model).named_parameters():
        mean = torch_jobs.whole(param)
        dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        expected[name] = mean
    job.train(range(4, 6))
    given = {}
    with Lines() as said:
        if dist.get_rank() == 0 or kind in ("fsdp", "hsdp"):  # a sharded model has its shard on each rank
            given = module_of(job.model).state_dict()
            module_of(job.model).state_dict()
    if dist.get_rank() == 0:
        job.optimizer.state_dict()
    far = max(
        (float((torch_jobs.whole(value) - expected[name]).abs().max()) for name, value in given.items()), default=0.0
    )
    job.train(range(6, 11))
    return far, said


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp", "hsdp"])
def test_the_last_average_is_there_on_rank_0_alone_and_says_how_old_it_is(four, kind):
    results = four().run(rank_0_alone, kind, config_of(kind, "last_average"))
    assert all(far < 1e-6 for far, _ in results)
    assert results[0][1] == [
        "deslo: state_dict() gives the average of all replicas after step 4; this replica is at step 6"
    ]


def before_the_first_average(config, folder):
    """state_dict() before any average, at the end of the warm-up, after a meeting, and after a load of an exact
    state."""
    import deslo_plugin

    job = Job("plain", config)
    start = copy.deepcopy(job.model.state_dict())
    job.train(range(2))
    given = [job.model.state_dict()["0.weight"]]
    deslo_plugin.save(folder, job.model, mode="per_replica")
    deslo_plugin.sync_replicas(job.model)
    met = job.model.state_dict()["0.weight"].clone()
    job.train(range(2, 3))
    given.append(job.model.state_dict()["0.weight"])
    deslo_plugin.load(folder, job.model)
    with pytest.raises(
        deslo_plugin.ConfigError, match="an average of 0.weight to give .*none since another state was loaded"
    ):
        job.model.state_dict()
    return torch.equal(given[0], start["0.weight"]), torch.equal(given[1], met)


def test_the_last_average_is_of_this_run(four, tmp_path):
    assert (
        four().run(before_the_first_average, config_of("plain", "last_average"), str(tmp_path / "c"))
        == [(True, True)] * 4
    )


def batch_norm_on_rank_0(config):
    """A saver of a network with running statistics on rank 0: how far they are from the mean that landed."""
    import deslo_plugin

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    optimizer = deslo_plugin.DesLoc([p for p in model.parameters() if p.requires_grad], config)
    deslo_plugin.attach(model, optimizer)
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * dist.get_rank() + step)
        model(torch.randn(5, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:  # the average after step 4 has landed in this one, buffers as they were in it
            landed = [model[1].running_mean.clone(), model[0].bias.clone()]
    if dist.get_rank() == 0:
        state = model.state_dict()
        torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4)).load_state_dict(state)
        return torch.equal(state["1.running_mean"], landed[0]), torch.equal(state["0.bias"], landed[1])


def test_the_last_average_has_running_statistics_and_frozen_parameters(four):
    config = {"optimizer": EVERY_4, "deslo": {"state_dict": "last_average"}}
    assert four().run(batch_norm_on_rank_0, config)[0] == (True, True)
