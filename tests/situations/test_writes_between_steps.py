"""What a script writes into weights or momenta between two steps: it is kept, and overlap changes no bit of it."""

import copy

import pytest
import torch
import torch.distributed as dist

import deslo_plugin
from deslo_plugin import DesLoc
from deslo_plugin.config.load import load_config
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.any_optimizer_step import schedule
from tests.support.worlds import threads

EVERY = {"params": 3, "exp_avg": 2, "exp_avg_sq": 6}


def clamped(rank, step, params, optimizer):
    for param in params:
        param.clamp_(-0.5, 0.5)


def row_begun_anew(rank, step, params, optimizer):
    if step % 3 == 2:
        params[0][1] = 0.0
        optimizer.state[params[0]]["exp_avg"][1] = 0.0


def on_one_replica_alone(rank, step, params, optimizer):
    if rank == 1:
        params[0].add_(1.0)


def through_data(rank, step, params, optimizer):
    params[1].data.mul_(0.5)


def rows_exchanged(rank, step, params, optimizer):
    params[0].copy_(params[0].flip(0))


def signs_turned(rank, step, params, optimizer):
    params[0].neg_()


def momentum_of_zeros(rank, step, params, optimizer):
    for param in params:
        optimizer.state[param]["exp_avg"].zero_()


WRITES = [clamped, row_begun_anew, on_one_replica_alone, through_data, rows_exchanged, signs_turned, momentum_of_zeros]


def desloc(params, average, **deslo):
    return DesLoc(
        params, {"optimizer": {"params": {"lr": 1e-2, "sync_every": EVERY}}, "deslo": deslo}, transport=average
    )


def stock(params, average, **deslo):
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    schedule(AnyOptimizerAverager(optimizer, load_config({"deslo": {"sync_every": EVERY, **deslo}}).deslo, average))
    return optimizer


def trained(average, make, write, steps=13, **deslo):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), torch.nn.Parameter(torch.zeros(4))]
    optimizer = make(params, average, **deslo)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + average.rank)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        with torch.no_grad():
            write(average.rank, step, params, optimizer)
    return [param.detach().clone() for param in params] + [
        optimizer.state[param]["exp_avg"].clone() for param in params
    ]


@pytest.mark.parametrize("write", WRITES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("make", [desloc, stock])
def test_with_overlap_and_without_the_same_bits(make, write):
    there, not_there = (
        threads(2, lambda average: trained(average, make, write, overlap_comm=on)) for on in (True, False)
    )
    for replica, other in zip(there, not_there):
        assert all(map(torch.equal, replica, other))


def test_nine_times_plus_one_is_nine():
    def replica(average):
        (x,) = params = [torch.nn.Parameter(torch.zeros(4))]
        optimizer = DesLoc(
            params,
            {"optimizer": {"params": {"lr": 0.0, "sync_every": {"params": 4}}}, "deslo": {"sync_delay": delay}},
            transport=average,
        )
        for _ in range(9):
            x.grad = torch.ones(4)
            optimizer.step()
            x.data += 1
        return x.detach()

    for delay in (1, 2, 3):
        assert all(torch.equal(x, torch.full((4,), 9.0)) for x in threads(2, replica))


def test_nothing_written_costs_one_word_of_an_average_and_something_written_one_average_more():
    def replica(average, write):
        (x,) = params = [torch.nn.Parameter(torch.zeros(100))]
        optimizer = DesLoc(params, rule="sgdm", sync_every={"params": 2, "exp_avg": 2}, transport=average)
        for _ in range(5):
            x.grad = torch.ones(100)
            optimizer.step()
            if write and average.rank == 0:
                x.data += 1
        assert sum(average.sent) == sum(optimizer.stats.bytes.values())
        return optimizer.stats.bytes, optimizer.stats.events

    for bytes_, events in threads(2, lambda average: replica(average, write=False)):
        assert bytes_ == {"params": 2 * (400 + 4), "exp_avg": 2 * 400} and events == {"params": 2, "exp_avg": 2}
    for bytes_, events in threads(2, lambda average: replica(average, write=True)):
        assert bytes_ == {"params": 2 * (2 * 400 + 4), "exp_avg": 2 * 2 * 400} and events == {"params": 2, "exp_avg": 2}


def restored(kind, what, whose, steps_to_landing, delay=1):
    """The model, or model and optimizer, go back to a copy between launch and landing, with rates of 0 from then on:
    what is there after the landing is the mean of what was restored."""
    torch.manual_seed(0)
    model, rank = torch.nn.Linear(4, 3), dist.get_rank()
    every = {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}
    deslo = {"timeout_s": 20.0} | ({"sync_delay": delay} if delay > 1 else {})
    if kind == "desloc":
        optimizer = DesLoc(
            model.parameters(), {"optimizer": {"params": {"lr": 1e-2, "sync_every": every}}, "deslo": deslo}
        )
        attachment = deslo_plugin.attach(model, optimizer)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        attachment = deslo_plugin.attach(model, optimizer, {"deslo": {"sync_every": every} | deslo})
    generator = torch.Generator().manual_seed(rank)

    def step():
        optimizer.zero_grad()
        (model(torch.randn(8, 4, generator=generator)) - rank).square().mean().backward()
        optimizer.step()

    for _ in range(6):
        step()
    with deslo_plugin.local_state_dict():
        kept = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    for _ in range(2):
        step()
    if whose == "all" or rank == 1:
        model.load_state_dict(kept[0])
        if what == "both":
            attachment.averaging.abandon()
    before = model.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    for _ in range(steps_to_landing):
        step()
    return before, model.weight.detach().clone()


@pytest.mark.parametrize(
    "kind, what, whose, delay",
    [
        ("desloc", "model", "all", 1),
        ("desloc", "both", "one", 1),
        ("stock", "model", "one", 1),
        ("stock", "both", "one", 1),
        ("desloc", "both", "one", 2),
    ],
)
def test_what_was_restored_while_an_average_flew_is_what_is_averaged(four, kind, what, whose, delay):
    results = four().run(restored, kind, what, whose, delay, delay)
    mean = torch.stack([before for before, _ in results]).mean(0)
    for _, after in results:
        assert torch.allclose(after, mean, atol=1e-6)
