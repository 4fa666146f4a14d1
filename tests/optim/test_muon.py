"""Muon in DesLoc: torch's own on one replica, the float64 oracle's in every form, and a rule beside it for all else."""

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc, load_config
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.comm.transport import SingleReplica
from deslo_plugin.planning.plan import make_plan
from deslo_plugin.simulation.replicas import Replicas
from tests.support.muon_oracle import Numbers, train
from tests.support.oracle import Setting, states
from tests.support.oracle import train as train_vector
from tests.support.quadratic import noisy_quadratic
from tests.support.worlds import threads

REPLICAS, STEPS, SHAPE = 3, 25, (5, 3)
PERIODS = {"x": 3, "u1": 2, "u2": 5}
BESIDE = {"u1": 4, "v": 7}
FORMS = {  # what a config says, and the betas and weights that it means
    "nesterov": ({"momenta": [{"beta": 0.9}]}, [0.9], [0.9]),
    "plain": ({"momenta": [{"beta": 0.9}], "nesterov": False}, [0.9], [1.0]),
    "quasi-hyperbolic": ({"momenta": [{"beta": 0.99, "weight": 0.7}]}, [0.99], [0.7]),
    "two and a rest": (
        {"momenta": [{"beta": 0.9, "weight": 0.3}, {"beta": 0.99, "weight": 0.4}]},
        [0.9, 0.99],
        [0.3, 0.4],
    ),
    "raw gradient": ({"momenta": [{"beta": 0.9, "weight": 0.0}]}, [0.9], [0.0]),
}


def blocks(params, n, beside="adam"):
    every = {"params": n.periods["x"]} | {
        name: n.periods[f"u{j + 1}"] for j, name in enumerate(["exp_avg", "exp_avg_2"][: len(n.betas)])
    }
    block = {"rule": "muon", "lr": n.lr, "weight_decay": n.weight_decay, "sync_every": every, **params}
    block["beside"] = {"rule": beside, "lr": 0.02, "eps": 1e-6, "betas": [0.9, 0.95]}
    block["beside"]["sync_every"] = {"exp_avg": BESIDE["u1"], "exp_avg_sq": BESIDE["v"]}
    deslo = {"wire_dtype": "float64", "average_at": "after_step" if n.after_update else "before_step"}
    return {"optimizer": {"type": "DesLoc", "params": block}, "deslo": deslo}


def start():
    return torch.linspace(-1, 1, 15, dtype=torch.float64).view(SHAPE), torch.linspace(-1, 1, 4, dtype=torch.float64)


def run_ours(config, replicas=REPLICAS):
    """States of matrix and vector on every replica."""

    def replica(average):
        params = [torch.nn.Parameter(each) for each in start()]
        optimizer = DesLoc(params, config, transport=average)
        for step in range(STEPS):
            for param in params:
                param.grad = noisy_quadratic(average.rank, step, param.detach())
            optimizer.step()
        tensors = lambda state: {name: value for name, value in state.items() if value.ndim}
        return [{"params": p.detach().clone()} | tensors(optimizer.state[p]) for p in params]

    return threads(replicas, replica)


def assert_oracle(ours, n, beside="adam", outer=None):
    matrix, vector = start()
    theory = train(n, matrix, REPLICAS, STEPS, noisy_quadratic)
    s = Setting(beside, {"x": n.periods["x"], **BESIDE}, [0.9], [1.0], eps=1e-6, lr=0.02, outer=outer)
    s.weight_decay, s.after_update = n.weight_decay, n.after_update
    world = train_vector([s], [vector], REPLICAS, STEPS, lambda m, t, x: [noisy_quadratic(m, t, x[0])])
    for (mine, others), expected, (group,) in zip(ours, theory, world, strict=True):
        names = {"x": "params", "u1": "exp_avg", "u2": "exp_avg_2"}
        expected = {names[key]: value for key, value in expected.items()}
        for got, want in ((mine, expected), (others, states(s, group))):
            assert {*want} == {*got} - {"outer_params", "outer_momentum"}
            for name, value in want.items():
                assert (got[name] - value).abs().max() < 1e-11, name


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_of_one_replica_it_is_torchs_muon(nesterov, adjust):
    """But for the rounding of its factor."""
    torch.manual_seed(0)
    for shape in [(4, 6), (6, 4), (1, 5)]:
        ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in "ab")
        optimizer = DesLoc([ours], rule="muon", lr=0.01, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
        options = {"lr": 0.01, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust}
        reference = torch.optim.Muon([theirs], **options)
        for _ in range(5):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            optimizer.step()
            reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("after_update", [False, True], ids=["before_step", "after_step"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_order_is_the_oracle(form, after_update):
    params, betas, weights = FORMS[form]
    n = Numbers({key: PERIODS[key] for key in ["x", "u1", "u2"][: 1 + len(betas)]}, betas, weights)
    n.after_update = after_update
    assert_oracle(run_ours(blocks(params, n)), n)


def test_with_adopt_beside_and_the_scale_of_its_author_it_is_the_oracle():
    n = Numbers({"x": 3, "u1": None}, [0.9], [0.9], rms=False)
    params = {"betas": [0.9], "adjust_lr_fn": "original"}
    assert_oracle(run_ours(blocks(params, n, "adopt")), n, "adopt")


def test_muloco_is_the_oracle_with_an_outer_step_for_all():
    n = Numbers({"x": 5, "u1": None}, [0.95], [0.95], outer=(0.7, 0.6))
    config = blocks({"outer_optimizer": {"lr": 0.7, "momentum": 0.6}}, n)
    assert_oracle(run_ours(config), n, outer=n.outer)


def test_the_switch_to_a_slow_momentum_without_nesterov_is_the_oracle():
    n = Numbers({"x": 3, "u1": 2}, [0.95], [0.95], switch=(9, [0.99], [0.9], 2.0))
    switch = {"at": 9, "betas": [0.99], "weights": [0.9], "lr_factor": 2.0}
    assert_oracle(run_ours(blocks({"switch": switch}, n)), n)


def test_the_rule_beside_it_makes_its_own_switch_at_the_same_step():
    n = Numbers({"x": 3, "u1": 2}, [0.95], [0.95], switch=(9, [0.99], [0.9], 1.0))
    config = blocks({"switch": {"at": 9, "betas": [0.99], "weights": [0.9]}}, n)
    config["optimizer"]["params"]["beside"]["switch"] = {"lr_factor": 0.0001}
    (_, before), (_, after) = (run_ours(each, 1)[0] for each in (blocks({}, n), config))
    assert (before["params"] - after["params"]).abs().max() > 0.1
    assert load_config(config).desloc.beside.switch.at == 9


def test_what_sees_no_matrices_refuses_and_the_banner_names_both_rules():
    n = Numbers({"x": 3, "u1": 2}, [0.95], [1.0])
    config = load_config(blocks({"nesterov": False}, n))
    with pytest.raises(ConfigError, match="rule: expected a rule of elements where replicas are simulated"):
        Replicas(torch.zeros(5), config, 2)
    flat = DesLoc([torch.nn.Parameter(torch.ones(2, 2))], config, armed=False)
    flat.param_groups[0]["params"] = [torch.ones(4)]
    with pytest.raises(ConfigError, match=r"rule muon: expected whole matrices.* got a flat part of shape \[4\]"):
        flat.attach(SingleReplica(), flat.param_groups[0]["params"])
    periods = [each.periods for each in config.desloc.by_rule.values()]
    said = make_plan(config, [100, 10], periods, contiguous(4, 0, 2)).describe()
    assert "muon, direction 1 u(0.95); beside matrices adam, direction 1 u(0.9)" in said
    assert "exp_avg_sq of param group 1: every 7 steps (given)" in said


def net():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 3))


def test_a_param_group_names_the_rule_of_its_parameters():
    model = net()
    embedding, weight, bias = model.parameters()
    groups = [{"params": [weight, bias], "weight_decay": 0.5}, {"params": [embedding], "rule": "adam", "lr": 0.25}]
    optimizer = DesLoc(groups, rule="muon", lr=0.5, beside={"lr": 0.125})
    of = [(group["rule"], group["lr"], group["weight_decay"], group["params"]) for group in optimizer.param_groups]
    assert [(rule, lr, decay) for rule, lr, decay, _ in of] == [
        ("muon", 0.5, 0.5),
        ("adam", 0.125, 0.5),
        ("adam", 0.25, 0.0),
    ]
    assert all(mine is theirs for (*_, (mine,)), theirs in zip(of, (weight, bias, embedding), strict=True))
    assert {"exp_avg_sq" in optimizer.state[param] for param in (bias, embedding)} == {True}
    assert "exp_avg_sq" not in optimizer.state[weight]


def test_states_of_both_rules_go_on_to_the_bit():
    def trained(model, optimizer, steps):
        for step in steps:
            for param in model.parameters():
                param.grad = noisy_quadratic(0, step, param.detach())
            optimizer.step()
        return [param.detach().clone() for param in model.parameters()]

    one, other = net(), net()
    optimizer = DesLoc(one.parameters(), rule="muon", lr=0.01)
    trained(one, optimizer, range(3))
    other.load_state_dict(one.state_dict())
    resumed = DesLoc(other.parameters(), rule="muon", lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    straight, again = trained(one, optimizer, range(3, 6)), trained(other, resumed, range(3, 6))
    assert all(map(torch.equal, straight, again))
    for named in (net().named_parameters(), [{"params": list(net().named_parameters())}]):
        groups = DesLoc(named, rule="muon", lr=0.01).param_groups
        assert [group["param_names"] for group in groups] == [["0.weight", "1.weight"], ["1.bias"]]


@pytest.mark.parametrize(
    "params, message",
    [
        ({"beside": {"rule": "muon"}}, "beside.rule: expected one of sgdm, adam, adopt"),
        ({"beside": {"outer_optimizer": {}}}, "beside.outer_optimizer: expected none: it is for all"),
        ({"beside": {"betas": [0.9, 0.95], "eps": -1}}, "beside.eps: expected"),
        ({"beside": {"switch": {"betas": [0.99]}}}, "beside.switch: expected the step of optimizer.params.switch"),
        ({"momenta": [{"beta": 0.9, "weight": 1}], "nesterov": True}, "nesterov: expected none beside a momentum"),
        ({"eps": 1e-8}, "eps: expected no such key for rule muon"),
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn: expected one of original, match_rms_adamw"),
        ({"ns_steps": 0}, "ns_steps: expected a whole number >= 1"),
        ({"reset_momenta": True, "sync_every": {"exp_avg": None}}, "here exp_avg, exp_avg_sq of beside is averaged"),
        ({"rule": "adam", "ns_steps": 5}, 'ns_steps: expected no such key for rule adam.*take "rule": "muon"'),
        ({"beside": {"nesterov": True}}, "beside.nesterov: expected no such key for rule adam"),
    ],
)
def test_what_cannot_be_meant_is_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"optimizer": {"params": {"rule": "muon"} | params}})


@pytest.mark.parametrize(
    "group, options, message",
    [
        ({"rule": "adopt"}, {"rule": "muon"}, "param group 0.rule: expected muon or adam, got 'adopt'"),
        ({"rule": "muon"}, {"rule": "muon"}, r"parameter 2: expected a matrix.*got one of shape \[3\]"),
        ({"rule": "muon"}, {"rule": "adam"}, "param group 0.rule: expected adam"),
    ],
)
def test_a_group_of_another_rule_or_shape_is_refused(group, options, message):
    with pytest.raises(ConfigError, match=message):
        DesLoc([{"params": net().parameters(), **group}], **options)
