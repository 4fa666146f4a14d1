"""States that some ranks have and others not yet, and optimizers that load, grow, are copied, or step by closures."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deslo_plugin

EVERY = {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}


class Heads(nn.Module):
    """A body and a head for each replica's own task."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(4))

    def forward(self, x, task):
        return self.heads[task](torch.tanh(self.body(x)))


def attached(kind, model, **deslo):
    if kind == "desloc":
        optimizer = deslo_plugin.DesLoc(
            model.parameters(), {"optimizer": {"params": {"lr": 1e-2, "sync_every": EVERY}}, "deslo": deslo}
        )
        return optimizer, deslo_plugin.attach(model, optimizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, deslo_plugin.attach(model, optimizer, {"deslo": {"sync_every": EVERY} | deslo})


def step(model, optimizer, *args):
    generator = torch.Generator().manual_seed(dist.get_rank())
    optimizer.zero_grad()
    (model(torch.randn(8, 4, generator=generator), *args) - dist.get_rank()).pow(2).mean().backward()
    optimizer.step()


def everyone(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def own_heads(then, folder):
    model = Heads()
    optimizer, _ = attached("stock", model, average_at="after_step")
    for _ in range(4 if then == "train" else 3):
        step(model, optimizer, dist.get_rank())
    head = model.heads[0].weight
    own = {name: value.clone() for name, value in optimizer.state.get(head, {}).items()}
    if then == "meet":
        deslo_plugin.sync_replicas(model)
    if then in ("averaged", "per_replica"):
        deslo_plugin.save(folder, model, mode=then)
        names = sorted(optimizer.state.get(head, {}))
        assert names == sorted(own)  # a save leaves the replicas as they are
        for _ in range(2):
            step(model, optimizer, dist.get_rank())
        straight = [param.detach().clone() for param in model.parameters()]
        deslo_plugin.load(folder, model)
        if then == "per_replica":
            assert sorted(optimizer.state.get(head, {})) == names
            for _ in range(2):
                step(model, optimizer, dist.get_rank())
            assert all(torch.equal(a, b) for a, b in zip(straight, model.parameters()))
    return own, {name: value.clone() for name, value in optimizer.state.get(head, {}).items()}


@pytest.mark.parametrize("then", ["train", "meet", "averaged", "per_replica"])
def test_a_head_that_one_replica_alone_trains_has_states_by_name_everywhere(four, tmp_path, then):
    results = four().run(own_heads, then, str(tmp_path / "c"))
    before, after = zip(*results)
    if then == "per_replica":
        return
    for state in after:
        assert torch.equal(state["exp_avg"], after[0]["exp_avg"]) and state["exp_avg"].any()
        assert state["step"] == after[0]["step"]
    if then != "train":
        assert torch.allclose(after[1]["exp_avg"], before[0]["exp_avg"] / 4, atol=1e-7)


def alone(kind, call):
    model = nn.Linear(4, 1)
    # one time limit for all: what is left of the average that failed must not meet those of the next attachment
    optimizer, _ = attached(kind, model, timeout_s=61.5)
    for _ in range(2):
        step(model, optimizer)
    with deslo_plugin.local_state_dict():
        saved = copy.deepcopy(optimizer.state_dict())
    try:
        if dist.get_rank() == 1:
            optimizer.load_state_dict(saved) if call == "load" else optimizer.add_param_group(
                {"params": [nn.Parameter(torch.ones(2))]}
            )
        for _ in range(8):
            step(model, optimizer)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def rolled_back(kind):
    model = nn.Linear(4, 1)
    optimizer, attachment = attached(kind, model)
    fresh = copy.deepcopy(optimizer.state_dict())
    for _ in range(4):
        step(model, optimizer)
    optimizer.load_state_dict(fresh)
    clock = attachment.steps
    for _ in range(2):
        step(model, optimizer)
    return clock, attachment.steps, attachment.stats.events["params"]


@pytest.mark.parametrize("kind", ["stock", "desloc"])
def test_a_roll_back_to_the_state_before_the_first_step_begins_the_clock_anew(four, kind):
    for clock, later, averages in four().run(rolled_back, kind):
        assert (clock, later, averages) == (0, 2, 0)


@pytest.mark.parametrize("kind", ["stock", "desloc"])
@pytest.mark.parametrize("call", ["load", "add"])
def test_a_load_or_a_new_group_of_one_rank_alone_is_an_error_on_every_rank(four, kind, call):
    errors = four().run(alone, kind, call)
    assert "no error" not in errors and "call it on every rank" in errors[1], errors
    assert all("which every rank must call" in error or "gave up" in error for error in errors[:1] + errors[2:]), errors


def changed(kind, what):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    torch.manual_seed(1)
    old = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5 if what == "adamw" else 0):
        old.zero_grad()
        model(torch.randn(8, 4)).pow(2).mean().backward()
        old.step()
    if what == "group":
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        inner, rest = model[2], list(model[0].parameters())
        optimizer = (
            torch.optim.AdamW(inner.parameters(), lr=1e-2)
            if kind == "stock"
            else deslo_plugin.DesLoc(
                inner.parameters(),
                {"optimizer": {"params": {"lr": 1e-2, "sync_every": EVERY}}, "deslo": {"average_at": "after_step"}},
            )
        )
        attachment = deslo_plugin.attach(
            model,
            optimizer,
            *([{"deslo": {"sync_every": EVERY, "average_at": "after_step"}}] if kind == "stock" else []),
        )
    else:
        optimizer, attachment = attached(kind, model, average_at="after_step")
    if what == "adamw":
        optimizer.load_state_dict(old.state_dict())
    for _ in range(2):
        step(model, optimizer)
    if what == "group":
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": rest, "lr": 1e-3})
    if what == "back":
        with deslo_plugin.local_state_dict():
            saved = copy.deepcopy(optimizer.state_dict())
        for _ in range(3):
            step(model, optimizer)
        optimizer.load_state_dict(saved)
    at = attachment.steps
    while attachment.steps < 8:
        step(model, optimizer)
    numel = sum(group.numel for group in attachment.plan.groups)
    return at, len(set(map(str, everyone([param.tolist() for param in model.parameters()])))), numel


@pytest.mark.parametrize("kind", ["stock", "desloc"])
@pytest.mark.parametrize("what, at", [("adamw", 7), ("group", 2), ("back", 2)])
def test_what_was_loaded_or_added_meets_with_the_rest_when_it_is_due(four, kind, what, at):
    """An average falls on step 8 of the clock that was loaded."""
    assert four().run(changed, kind, what) == [(at, 1, 25)] * 4


def test_torchs_own_state_creating_step_is_no_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attachment = deslo_plugin.attach(model, optimizer, {"deslo": {"sync_every": EVERY}})
    fresh = get_optimizer_state_dict(model, optimizer)
    assert attachment.steps == 0
    for group in fresh["param_groups"]:
        group["deslo_step"] = 6
    set_optimizer_state_dict(model, optimizer, fresh)
    assert attachment.steps == 6


@pytest.mark.parametrize("kind", ["stock", "desloc"])
def test_copies_of_an_attached_optimizer_train_on_their_own(kind):
    model = nn.Linear(4, 1)
    optimizer, attachment = attached(kind, model)
    model(torch.ones(8, 4)).pow(2).mean().backward()
    optimizer.step()
    for other, copied in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert torch.equal(copied.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
        before = other.weight.detach().clone()
        other(torch.ones(8, 4)).pow(2).mean().backward()
        copied.step()
        assert not torch.equal(before, other.weight) and attachment.steps == 1


def test_lbfgs_and_wrappers_are_refused_with_what_to_do():
    model = nn.Linear(4, 1)
    with pytest.raises(deslo_plugin.ConfigError, match="LBFGS, which keeps one history of all"):
        deslo_plugin.attach(model, torch.optim.LBFGS(model.parameters()), {"deslo": {"sync_every": {"params": 4}}})
    sam = torch.optim.SGD(model.parameters(), lr=0.1)
    sam.base_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(deslo_plugin.ConfigError, match="optimizer.base_optimizer"):
        deslo_plugin.attach(model, sam, {"deslo": {"sync_every": {"params": 4}}})


def test_a_wrapper_of_several_optimizers_is_refused_with_a_call_for_each():
    """As scripts make one optimizer of Muon and AdamW, or of one for each part of a model."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    inner = [torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[1].parameters(), lr=0.1)]
    both = torch.optim.SGD(model.parameters(), lr=0.1)
    for name, held in (("first", inner[0]), ("others", inner[1:])):
        setattr(both, name, held)
    with pytest.raises(
        deslo_plugin.ConfigError,
        match=(
            r"which wraps AdamW and SGD; attach each of the inner ones with its own sync_every: "
            r"attach\(model, optimizer.first, ...\), "
            r"attach\(model, optimizer.others\[0\], ...\), and go on calling SGD as before"
        ),
    ):
        deslo_plugin.attach(model, both, {"deslo": {"sync_every": {"params": 4}}})
