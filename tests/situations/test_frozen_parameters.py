"""Parameters that are frozen, and that begin or cease to train: what trains has state, bytes and averages, and no
more."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deslo_plugin
from deslo_plugin import DesLoc
from deslo_plugin.kernels.local_tensors import local

EVERY = {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}


class Adapted(nn.Module):
    """A frozen base of 272 numbers, and 64 that train."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(16, 16).requires_grad_(False)
        self.a, self.b = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def attached(kind, wrap="plain", model=None, groups=None, **deslo):
    model, where = model or Adapted(), {}
    if wrap == "ddp":
        model, deslo = nn.parallel.DistributedDataParallel(model), deslo | {"replica_size": 1}
    if wrap == "fsdp":
        from tests.support.torch_jobs import mesh_of

        mesh = mesh_of((2, 2), ("replicate", "shard"))
        torch.distributed.fsdp.fully_shard(model, mesh=mesh["shard"])
        where = {"mesh": mesh}
    params = groups(model) if groups else model.parameters()
    deslo = {"timeout_s": 30.0} | deslo
    if kind == "desloc":
        optimizer = DesLoc(params, {"optimizer": {"params": {"lr": 1e-2, "sync_every": EVERY}}, "deslo": deslo})
        return model, optimizer, deslo_plugin.attach(model, optimizer, **where)
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    return model, optimizer, deslo_plugin.attach(model, optimizer, {"deslo": deslo | {"sync_every": EVERY}}, **where)


def stepper(model, optimizer):
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step(count=1):
        for _ in range(count):
            optimizer.zero_grad()
            (model(torch.randn(8, 16, generator=generator)) - dist.get_rank()).square().mean().backward()
            optimizer.step()

    return step


def spread(tensor):
    """The largest difference between ranks."""
    largest, smallest = tensor.detach().clone(), tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return float((largest - smallest).max())


def what_trains_is_sent(kind, wrap):
    model, optimizer, attachment = attached(kind, wrap)
    stepper(model, optimizer)(10)
    state = sum(
        value.numel() for each in optimizer.state.values() for value in local(list(each.values())) if value.ndim
    )
    planned = {name: sum(attachment.plan.bytes_at(t).get(name, 0) for t in range(10)) for name in EVERY}
    saved = deslo_plugin.averaged_state_dict(model)
    return dict(attachment.stats.bytes), planned, state, set(saved), attachment.plan.flight_bytes


@pytest.mark.parametrize("kind", ["desloc", "stock"])
@pytest.mark.parametrize("wrap", ["plain", "ddp", "fsdp"])
def test_frozen_parameters_have_no_state_and_send_nothing(four, kind, wrap):
    numel = 32 if wrap == "fsdp" else 64
    for sent, planned, state, saved, flying in four().run(what_trains_is_sent, kind, wrap):
        assert sent == planned == {"params": 2 * (4 * numel + 4), "exp_avg": 2 * 4 * numel, "exp_avg_sq": 2 * 4 * numel}
        assert state == 2 * numel and flying == 3 * 4 * numel
        assert {"base.weight", "base.bias"} <= saved


def unfrozen(kind, whose, deslo, groups=None):
    model, optimizer, attachment = attached(kind, groups=groups, **deslo)
    step = stepper(model, optimizer)
    step(5)
    base = model.base
    if whose == "all" or dist.get_rank() == 1:
        base.requires_grad_(True)
    step(2)
    before = spread(base.weight)  # it takes local steps at once
    step(1 + 4)
    step(4)
    clocks = {int(state["step"]) for state in optimizer.state.values()} if kind == "desloc" else None
    base.requires_grad_(False)
    optimizer.zero_grad()
    step(5)
    sent = attachment.stats.bytes["params"]
    step(8)
    return (
        before,
        clocks,
        attachment.stats.bytes["params"] - sent,
        spread(base.weight),
        attachment.plan.bytes_at(4)["params"],
    )


def in_two_groups(model):
    return [{"params": list(model.base.parameters())}, {"params": [*model.a.parameters(), *model.b.parameters()]}]


@pytest.mark.parametrize("kind", ["desloc", "stock"])
@pytest.mark.parametrize("deslo", [{}, {"overlap_comm": False}, {"average_at": "after_step"}], ids=str)
@pytest.mark.parametrize("groups", [None, in_two_groups])
def test_a_parameter_that_is_unfrozen_averages_with_the_others_until_it_is_frozen_again(four, kind, deslo, groups):
    for before, clocks, sent, after, planned in four().run(unfrozen, kind, "all", deslo, groups):
        assert before > 0 and after == 0
        assert sent == 2 * (4 * 64 + 4) and planned == 4 * 64 + 4  # of what trains, twice
        assert clocks in (None, {16})


def on_one_replica_alone(kind, deslo):
    try:
        unfrozen(kind, "one", deslo)
    except deslo_plugin.ConfigError as error:
        return str(error)


def thawed():
    model = Adapted().requires_grad_(False)
    model, optimizer, attachment = attached("desloc", model=model)
    nothing = attachment.plan.bytes_at(4)
    model.base.requires_grad_(True)
    step = stepper(model, optimizer)
    step(5)
    return nothing, attachment.stats.bytes["params"], attachment.plan.bytes_at(4)["params"]


def test_a_model_that_is_frozen_when_it_is_attached_may_train_later(four):
    for nothing, sent, planned in four().run(thawed):
        assert not any(nothing.values()) and sent == planned == 4 * 272 + 4


@pytest.mark.parametrize(
    "kind, deslo", [("desloc", {}), ("stock", {"overlap_comm": False}), ("desloc", {"sync_delay": 2})], ids=str
)
def test_one_that_is_unfrozen_on_one_replica_alone_is_an_error_on_all(four, kind, deslo):
    for message in four().run(on_one_replica_alone, kind, deslo):
        assert (
            "parameter base.weight: expected training on every replica or on none (requires_grad), got on some only"
            in message
        )
