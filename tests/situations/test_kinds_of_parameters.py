"""Parameters, groups and clocks that a first parameter, a default dtype or a number of dimensions says nothing of."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deslo_plugin
from deslo_plugin import ConfigError, DesLoc, load_config
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.any_optimizer_step import schedule
from tests.support.worlds import threads

EVERY = {"params": 2, "exp_avg": 2, "exp_avg_sq": 2}


class Scaled(nn.Module):
    """With a logit scale, which has no dimensions; ``alone``: nothing else."""

    def __init__(self, alone=False):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.layer = nn.Identity() if alone else nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * self.scale


def make(kind, params, periods=EVERY, **deslo):
    if kind == "desloc":
        return DesLoc(params, {"optimizer": {"params": {"lr": 1e-2, "sync_every": periods}}, "deslo": deslo}), None
    return torch.optim.AdamW(params, lr=1e-2), {"deslo": deslo | {"sync_every": periods}}


def step(model, optimizer, count, generator):
    for _ in range(count):
        optimizer.zero_grad()
        (model(torch.randn(8, 4, generator=generator)) - dist.get_rank()).square().mean().backward()
        optimizer.step()


def everyone(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def scale_trained(kind, alone, folder):
    model = Scaled(alone)
    optimizer, config = make(kind, model.parameters(), average_at="after_step")
    attachment, generator = (
        deslo_plugin.attach(model, optimizer, config),
        torch.Generator().manual_seed(dist.get_rank()),
    )
    step(model, optimizer, 2, generator)

    def both():
        return torch.stack(
            [model.scale.detach(), *(optimizer.state[model.scale][state] for state in ("exp_avg", "exp_avg_sq"))]
        )

    averaged = everyone(both())
    step(model, optimizer, 1, generator)
    apart = torch.stack(everyone(both()))
    deslo_plugin.save(folder, model)
    saved = deslo_plugin.load_averaged_state_dict(folder)["scale"]
    deslo_plugin.load(folder, model)
    loaded = both()
    step(model, optimizer, 2, generator)
    deslo_plugin.sync_replicas(model)
    return averaged, apart, saved, loaded, everyone(both()), attachment.stats.bytes


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", ["desloc", "stock"])
def test_a_parameter_without_dimensions_averages_saves_and_meets_like_others(four, tmp_path, kind, alone):
    numel = 1 if alone else 21
    for averaged, apart, saved, loaded, met, sent in four().run(scale_trained, kind, alone, tmp_path / "saved"):
        assert all(torch.equal(each, averaged[0]) for each in averaged) and apart.std(0).min() > 0
        assert torch.allclose(saved, apart.mean(0)[0]) and torch.allclose(loaded, apart.mean(0))
        assert all(torch.equal(each, met[0]) for each in met)
        assert sent["params"] == 2 * (4 * numel + 4) and sent["exp_avg"] == 2 * 4 * numel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_clocks_are_right_under_any_default_dtype_and_after_any_number_of_steps(dtype):
    def replica(average):
        param = nn.Parameter(torch.zeros(3, dtype=torch.float32))
        every = {"params": 3, "exp_avg": {"adaptive": {"min": 300, "max": 600}}}
        optimizer = DesLoc([param], {"optimizer": {"params": {"rule": "sgdm", "sync_every": every}}}, transport=average)
        for start in (0, 2**24, 2**40):
            optimizer.state[param]["step"].fill_(3 * start)
            for _ in range(4):
                param.grad = torch.full((3,), float(average.rank), dtype=torch.float32)
                optimizer.step()
            assert int(optimizer.state[param]["step"]) == optimizer.averaging.steps == 3 * start + 4
        return optimizer.stats.events["params"]

    torch.set_default_dtype(dtype)
    try:
        assert threads(2, replica) == [1 + 2 + 2] * 2
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["desloc", "stock"])
@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_param_groups_may_be_empty_anywhere(kind, empty):
    def replica(average):
        params = [nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]
        groups = [{"params": [] if index in empty else [param]} for index, param in enumerate(params)]
        optimizer, config = make(kind, groups, average_at="after_step")
        if kind == "desloc":
            optimizer.attach(average, [param for group in groups for param in group["params"]])
            averaging = optimizer.averaging
        else:
            averaging = AnyOptimizerAverager(optimizer, load_config(config).deslo, average)
            schedule(averaging)
        for _ in range(4):
            for param in params:
                param.grad = torch.full_like(param, 1.0 + average.rank)
            optimizer.step()
        assert (
            averaging.steps == averaging.stats.steps == 4
            and averaging.stats.events["params"] == 2
            and averaging.diverged
        )
        return [param.detach() for param in params]

    assert all(map(torch.equal, *threads(2, replica)))


def test_a_meter_counts_averages_after_the_clock_went_back_too():
    def replica(average):
        param = nn.Parameter(torch.ones(2))
        optimizer = DesLoc([param], rule="sgdm", sync_every={"params": 2, "exp_avg": None}, transport=average)
        for _ in range(3):
            kept = None
            for step in range(3):  # after each third step, back to where the second began
                if step == 1:
                    kept = optimizer.state_dict()
                param.grad = torch.ones(2)
                optimizer.step()
            optimizer.load_state_dict(kept)
        return optimizer.stats.steps, optimizer.stats.events["params"], optimizer.stats.bytes["params"]

    assert threads(2, replica) == [(9, 4, 4 * 12)] * 2


def refused(what):
    if what == "complex":
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    else:
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1))
    optimizer, config = make("stock" if what == "complex" else "desloc", model.parameters())
    with pytest.raises(ConfigError) as error:
        deslo_plugin.attach(model, optimizer, config)
    return str(error.value)


def test_complex_parameters_and_sparse_gradients_of_desloc_are_refused_by_name(four):
    for complex_, sparse in zip(four().run(refused, "complex"), four().run(refused, "sparse")):
        assert "parameter weight: expected real numbers, got complex64" in complex_
        assert "module 0: expected Embedding(sparse=False) with DesLoc" in sparse


def sparse_trained(deslo):
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=1e-2)
    deslo_plugin.attach(embedding, optimizer, {"deslo": {"average_at": "after_step", "sync_every": EVERY} | deslo})
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(4):
        optimizer.zero_grad()
        (embedding(torch.randint(0, 20, (8,), generator=generator)) - 1).square().mean().backward()
        optimizer.step()
    return all(torch.equal(each, embedding.weight) for each in everyone(embedding.weight.detach()))


@pytest.mark.parametrize("deslo", [{}, {"synchronous_steps": 2}, {"on_nonfinite": "skip"}], ids=str)
def test_sparse_gradients_of_an_optimizer_that_takes_them_work(four, deslo):
    assert all(four().run(sparse_trained, deslo))


def joined():
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
    deslo_plugin.attach(model, DesLoc(model.parameters(), {"deslo": {"replica_size": 2}}))
    with pytest.raises(ConfigError) as error:
        model.join()
    return str(error.value)


def test_a_join_is_refused_in_a_sentence_at_once(four):
    assert all("DDP.join(): expected as many steps on every rank" in message for message in four().run(joined))


def laid_out(change, optimizer_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))
    optimizer = optimizer_of(model.parameters())
    for t in range(6):
        if t == 2 and change:
            model.to(memory_format=torch.channels_last)
        torch.manual_seed(t)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def test_channels_last_set_between_steps_changes_nothing():
    ours, theirs = (
        lambda params: DesLoc(params, lr=1e-2, sync_every={"params": 2}),
        lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for change in (False, True):
        assert torch.allclose(laid_out(change, ours), laid_out(change, theirs), atol=1e-6)
