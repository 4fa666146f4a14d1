"""The switch of MT-DAO's recipe against the float64 oracle: rules, forms, orders, delays; what it must not touch."""

from dataclasses import replace

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc
from deslo_plugin.comm.transport import SingleReplica
from tests.support.oracle import Setting, Switch, blocks
from tests.support.quadratic import assert_equal, expected, noisy_quadratic, rare, run_ours

WARM_UP = 9
PERIODS = {"x": 3, "u1": 2, "u2": 5, "v": 4}
FORMS = {  # the betas and weights before, and what becomes of them
    "slow momentum": ([0.9], [1.0], Switch(WARM_UP, [0.99], [0.95], 2.0, (1,))),
    "two momenta": ([0.9, 0.99], [1.0, 0.0], Switch(WARM_UP, [0.9, 0.99], [0.05, 0.95], 2.0, (1, 2))),
    "one of two reset": ([0.5, 0.99], [0.8, 0.1], Switch(WARM_UP, [0.95, 0.9], [0.3, 0.4], 0.5, (2,))),
}


def setting(rule, form, **others):
    betas, weights, switch = FORMS[form]
    others.setdefault("switch", switch)
    return Setting(rule, PERIODS, betas, weights, **{"weight_decay": 0.1, "beta2": 0.999} | others)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_the_switch_at_the_end_of_the_warm_up_is_the_oracle(rule, form):
    s, run = setting(rule, form), {"synchronous_steps": WARM_UP, "gradient": rare}
    assert_equal(run_ours(s, **run), expected(s, **run), 1e-12)


@pytest.mark.parametrize("when", [{}, {"after_update": True}, {"delay": 2}], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["adam", "adopt"])
def test_a_later_switch_lets_nothing_old_land_in_what_is_reset(rule, form, when):
    """At steps of which averages of momenta are due, were launched, and are under way."""
    for at in (10, 11, 12):
        s = setting(rule, form, **when)
        s = replace(s, switch=replace(s.switch, at=at))
        run = {"synchronous_steps": 4, "gradient": rare}
        assert_equal(run_ours(s, **run), expected(s, **run), 1e-12)


@pytest.mark.parametrize("delay", [1, 2])
def test_fragments_of_a_momentum_that_is_reset_land_as_the_oracle_says(delay):
    from tests.support.theory import cut

    s = setting("adam", "two momenta", delay=delay)
    s = cut(replace(s, switch=replace(s.switch, at=11)), 2)
    assert_equal(run_ours(s), expected(s), 1e-12)


def test_with_an_outer_optimizer_the_switch_is_the_oracle():
    s = setting("adopt", "slow momentum", outer=(0.7, 0.9))
    for warm_up in (WARM_UP, 4):
        run = {"synchronous_steps": warm_up}
        assert_equal(run_ours(s, **run), expected(s, **run), 1e-12)


@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_before_the_switch_no_bit_differs_from_synchronous_training_without_one(rule):
    s, run = setting(rule, "two momenta"), {"synchronous_steps": WARM_UP, "dtype": torch.float32}
    ours = run_ours(s, steps=WARM_UP, **run)
    plain = run_ours(replace(s, switch=None), steps=WARM_UP, **run)
    ordinary = run_ours(replace(s, switch=None, betas=[0.9], weights=[1.0]), steps=WARM_UP, **run)
    for mine, without, one in zip(ours, plain, ordinary, strict=True):
        assert all(torch.equal(mine[state], without[state]) for state in without)
        assert all(torch.equal(mine[state], one[state]) for state in one)  # a momentum of weight 0 only listens


def optimizer_of(s, param, **deslo):
    return DesLoc([param], blocks(s, wire_dtype="float64", **deslo), transport=SingleReplica())


def stepped(optimizer, param, steps, schedule=None):
    for step in steps:
        param.grad = noisy_quadratic(0, step, param.detach())
        optimizer.step()
        if schedule:
            schedule.step()
    return param.detach().clone()


def test_the_factor_multiplies_what_a_scheduler_writes_and_never_compounds():
    """A scheduler that knew of the switch, and one that rewrites the rate at every step beside ``lr_factor``."""
    rates = lambda step: 1.0 / (1 + step)
    ends = []
    for factor in (3.0, 1.0):
        s = setting("adam", "slow momentum")
        s = replace(s, switch=replace(s.switch, lr_factor=factor))
        param = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        optimizer = optimizer_of(s, param)
        known = 3.0 / factor
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step, known=known: rates(step) * (known if step >= WARM_UP else 1.0)
        )
        ends.append(stepped(optimizer, param, range(20), schedule))
        assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
    torch.testing.assert_close(*ends, rtol=1e-14, atol=0)


def test_a_rate_in_a_tensor_is_multiplied_and_left_alone():
    ends = []
    for rate in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        param = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        optimizer = optimizer_of(setting("adopt", "slow momentum"), param)
        optimizer.param_groups[0]["lr"] = rate
        ends.append(stepped(optimizer, param, range(20)))
        assert float(optimizer.param_groups[0]["lr"]) == 0.5
    torch.testing.assert_close(*ends, rtol=1e-14, atol=0)


@pytest.mark.parametrize("steps", [WARM_UP - 1, WARM_UP, WARM_UP + 1])
def test_a_state_dict_goes_on_to_the_bit_before_at_and_after_the_switch(steps):
    s = setting("adam", "two momenta")
    param, again = (torch.nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    optimizer = optimizer_of(s, param)
    again.data.copy_(stepped(optimizer, param, range(steps)))
    resumed = optimizer_of(s, again)
    resumed.load_state_dict(optimizer.state_dict())
    straight = stepped(optimizer, param, range(steps, 20))
    assert torch.equal(straight, stepped(resumed, again, range(steps, 20)))


def test_states_of_a_run_with_another_switch_are_refused_once_either_was_made():
    s = setting("adam", "slow momentum")
    param = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = optimizer_of(s, param)
    stepped(optimizer, param, range(WARM_UP))
    other = optimizer_of(replace(s, switch=replace(s.switch, lr_factor=1.0)), param)
    other.load_state_dict(optimizer.state_dict())  # neither was made: the next step makes the one that is configured
    stepped(optimizer, param, range(WARM_UP, WARM_UP + 1))
    with pytest.raises(
        ConfigError, match="switch that these states have made, after step 9 .* got after step 9 .*lr x 1"
    ):
        other.load_state_dict(optimizer.state_dict())
    without = optimizer_of(replace(s, switch=None), param)
    with pytest.raises(ConfigError, match="got none; write it as it was"):
        without.load_state_dict(optimizer.state_dict())
    without = optimizer_of(replace(s, switch=None), param)
    stepped(without, param, range(WARM_UP + 1))
    with pytest.raises(ConfigError, match="at 10 or later: .* have not switched.*set at .* to 10"):
        optimizer.load_state_dict(without.state_dict())
