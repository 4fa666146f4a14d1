"""Coordinates whose gradient is often zero on some replicas: rows of an embedding, dead ReLUs, a part of a model that
one replica alone trains. Averages of Adam's states on unequal periods step there no farther than those on one
period."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deslo_plugin import DesLoc, load_config
from deslo_plugin.comm.transport import SingleReplica
from deslo_plugin.config.file import read_file
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.any_optimizer_step import schedule
from tests.support.worlds import threads

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LR, REPLICAS, ROWS, LABELS = 1e-3, 2, 300, 4
UNEQUAL, ALIKE = (8, 24, 48), (8, 8, 8)


def periods(every, second="exp_avg_sq"):
    return dict(zip(("params", "exp_avg", second), every))


def desloc(config, every, deslo=None, **more):
    """DesLoc by a file of configs/, with other periods."""
    params = (
        read_file(CONFIGS / f"{config}.json")["optimizer"]["params"] | {"lr": LR, "sync_every": periods(every)} | more
    )
    for momentum in [*params.get("momenta", []), params.get("second_moment", {})]:
        momentum.pop("sync_every", None)
    if "switch" in params:
        params["switch"] |= {"at": 24}  # there is no warm-up here
    return lambda params_of, average: DesLoc(
        params_of, {"optimizer": {"params": params}, "deslo": deslo or {}}, transport=average
    )


def stock(build, every, second="exp_avg_sq", **more):
    """One of torch's optimizers, its states on ``every``."""

    def attached(params, average):
        optimizer = build(params, lr=LR)
        deslo = load_config({"deslo": {"sync_every": periods(every, second) | more}}).deslo
        schedule(AnyOptimizerAverager(optimizer, deslo, average))
        return optimizer

    return attached


def trained(model, loss_of, optimizer_of, steps):
    """The largest change of a weight in a step, on any replica, in units of the rate, and the mean of its last ten
    losses."""

    def replica(average):
        mine, generator = copy.deepcopy(model), torch.Generator().manual_seed(1 + average.rank)
        optimizer, largest, losses = optimizer_of(list(mine.parameters()), average), [], []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(mine, generator)
            loss.backward()
            before = [p.detach().clone() for p in mine.parameters()]
            optimizer.step()
            largest += [float((p.detach() - old).abs().max()) for p, old in zip(mine.parameters(), before)]
            losses.append(float(loss.detach()))
        return max(largest) / LR, sum(losses[-10:]) / 10

    return [max(each) for each in zip(*threads(REPLICAS, replica))]


def embedding(optimizer_of, steps=110):
    """Rows drawn by Zipf's law, each of which learns a target of its own: most rows are seen by one replica, or by
    none."""
    generator = torch.Generator().manual_seed(0)
    start, targets = (torch.randn(ROWS, 4, generator=generator) for _ in range(2))
    chances = 1 / torch.arange(1.0, ROWS + 1)

    def loss_of(model, generator):
        rows = torch.multinomial(chances, 8, generator=generator)
        return (model(rows) - targets[rows]).square().sum(1).mean()

    return trained(nn.Embedding(ROWS, 4, _weight=start), loss_of, optimizer_of, steps)


def convolutions(optimizer_of, steps=110):
    """Noisy images of few labels, four at a time, and ReLUs that are dead for all of them, in the manner of DeepSpeed's
    CIFAR."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, LABELS),
    )
    templates = torch.randn(LABELS, 3, 10, 10)

    def loss_of(model, generator):
        labels = torch.randint(LABELS, (4,), generator=generator)
        images = templates[labels] + torch.randn(4, 3, 10, 10, generator=generator)
        return F.cross_entropy(model(images), labels)

    return trained(model, loss_of, optimizer_of, steps)


def amsgrad(params, lr):
    return torch.optim.AdamW(params, lr=lr, amsgrad=True)


@pytest.mark.parametrize("config", ["des-loc-adam", "des-loc-adam-qh", "des-loc-nesterov", "mt-dao-adam-n2"])
@pytest.mark.parametrize("task", [embedding, convolutions])
def test_desloc_at_its_default_periods_steps_as_calmly_as_with_equal_ones(task, config):
    largest, loss = task(desloc(config, UNEQUAL))
    calm, its_loss = task(desloc(config, ALIKE))
    assert largest < 1.5 * calm and loss < its_loss + 0.3


ADAPTIVE = {"params": 8, "exp_avg": {"adaptive": {"min": 8, "max": 32, "drift": 0.5}}, "exp_avg_sq": 48}


@pytest.mark.parametrize(
    "more",
    [
        {"deslo": {"sync_delay": 4}},
        {"deslo": {"average_at": "after_step"}},
        {"deslo": {"synchronous_steps": 20}},
        {"state_dtype": "bfloat16"},
        {"bias_correction": False},
        {"betas": [0.9, 0.999]},
        {"betas": [0.0, 0.95]},
        {"sync_every": ADAPTIVE},
        {"sync_every": {"params": 8, "exp_avg": 24, "exp_avg_sq": None}},
        {"sync_every": {"params": 8, "exp_avg": None, "exp_avg_sq": 24}},
    ],
    ids=str,
)
def test_so_it_does_with_every_option(more):
    largest, loss = embedding(desloc("des-loc-adam", UNEQUAL, **more))
    calm, its_loss = embedding(desloc("des-loc-adam", ALIKE, **more | {"sync_every": periods(ALIKE)}))
    assert largest < 1.5 * calm and loss < its_loss + 0.3


@pytest.mark.parametrize(
    "build, second, more",
    [
        (torch.optim.AdamW, "exp_avg_sq", {}),
        (torch.optim.NAdam, "exp_avg_sq", {}),
        (torch.optim.RAdam, "exp_avg_sq", {}),
        (amsgrad, "exp_avg_sq", {"max_exp_avg_sq": None}),
        (torch.optim.Adamax, "exp_inf", {}),
    ],
    ids=["AdamW", "NAdam", "RAdam", "AMSGrad", "Adamax"],
)
@pytest.mark.parametrize("task", [embedding, convolutions])
def test_torchs_optimizers_step_as_calmly_as_with_equal_periods(task, build, second, more):
    largest, loss = task(stock(build, UNEQUAL, second, **more))
    calm, its_loss = task(stock(build, ALIKE, second, **more))
    assert largest < 1.5 * calm and loss < its_loss + 0.3


@pytest.mark.parametrize("task", [embedding, convolutions])
def test_adopt_needs_no_hold_it_divides_before_it_averages(task):
    """Its gradients are at most t^(1/4) by its own clamp, wherever v comes from."""
    largest, _ = task(desloc("des-loc-adopt", UNEQUAL))
    assert largest < 2 * 110**0.25


class Quasi(torch.optim.Optimizer):
    """Keeps a first and a second moment under names that nobody knows."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.95)})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].setdefault("fast", torch.zeros_like(p))
            self.state[p].setdefault("second", torch.zeros_like(p))


def slow_adam(params, lr):
    return torch.optim.Adam(params, lr=lr, betas=(0.99, 0.95))


def rmsprop(params, lr):
    return torch.optim.RMSprop(params, lr=lr, momentum=0.9)


@pytest.mark.parametrize(
    "build, sync_every, said",
    [
        (Quasi, {"params": 2, "fast": 4, "second": 8}, "Quasi: fast and second are averaged on different periods"),
        (
            slow_adam,
            {"params": 2, "exp_avg": 4, "exp_avg_sq": 8},
            "Adam: beta 0.99 of exp_avg outlives beta2 0.95 of exp_avg_sq, so "
            "that steps have no bound where gradients are rare: take beta2 above 0.9801, or give both one period",
        ),
        (Quasi, {"params": 2, "fast": 4, "second": 4}, None),
        (slow_adam, {"params": 2, "exp_avg": 4, "exp_avg_sq": 4}, None),
        (amsgrad, {"params": 2, "exp_avg": 4, "exp_avg_sq": 8, "max_exp_avg_sq": None}, None),
        (rmsprop, {"params": 2, "square_avg": 8, "momentum_buffer": 4}, None),
        (torch.optim.Adadelta, {"params": 2, "square_avg": 8, "acc_delta": 4}, None),
    ],
    ids=["unknown names", "r above 1", "one period", "r above 1, one period", "amsgrad", "rmsprop", "adadelta"],
)
def test_what_nothing_holds_is_said_once_after_the_first_step(caplog, build, sync_every, said):
    model = nn.Linear(3, 2)
    optimizer = build(list(model.parameters()), lr=LR)
    schedule(AnyOptimizerAverager(optimizer, load_config({"deslo": {"sync_every": sync_every}}).deslo, SingleReplica()))
    with caplog.at_level(logging.WARNING, logger="deslo_plugin"):
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    warned = [
        record.message
        for record in caplog.records
        if record.name == "deslo_plugin" and "averaged" in record.message or "outlives" in record.message
    ]
    assert len(warned) == (said is not None) and (said is None or f"deslo: {said}" in warned[0])
