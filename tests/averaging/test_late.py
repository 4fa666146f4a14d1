"""Averages that land some steps after their launch: against the oracle, and where they must change nothing."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc, NonFiniteError, load_config
from deslo_plugin.kernels.drift import Drift
from tests.support.oracle import Setting, blocks, train
from tests.support.quadratic import MOMENTA, SIZE, STEPS, assert_equal, expected, noisy_quadratic, rare, run_ours
from tests.support.worlds import threads

EVERY = {"x": 4, "u1": 3, "u2": 5, "u3": None, "v": 7}


def settings(delay=3, rule="adam", lr=1e-2, sync_every=None, **deslo):
    block = {"rule": rule, "lr": lr, "sync_every": sync_every or {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}}
    return {"optimizer": {"params": block}, "deslo": {"sync_delay": delay, **deslo}}


def give_gradients(params, step, rank=0):
    generator = torch.Generator().manual_seed(100 * step + rank)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("delay", [2, 3])
@pytest.mark.parametrize("momenta", MOMENTA)
@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_every_rule_is_the_oracle_in_float64(rule, momenta, delay):
    s = Setting(rule, EVERY, *MOMENTA[momenta], weight_decay=0.1, delay=delay)
    assert_equal(run_ours(s), expected(s), 1e-12)
    assert_equal(run_ours(s, gradient=rare), expected(s, gradient=rare), 1e-12)


@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_float32_is_the_oracle(rule):
    s = Setting(rule, EVERY, [0.9, 0.99], [0.5, 0.3], eps=1e-4, lr=1e-3, delay=3)
    assert_equal(run_ours(s, dtype=torch.float32), expected(s), 1e-6)


def of_step(replica, step, x):
    """A gradient that depends neither on where the parameters are nor, but for its noise, on the replica."""
    return noisy_quadratic(0, 1000 * replica + step, torch.zeros_like(x))


@pytest.mark.parametrize("delay", [2, 4])
@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_with_given_gradients_a_late_average_is_as_good_as_a_prompt_one(rule, delay):
    """Momenta land exactly. Parameters too if no momentum is averaged, along which they would have gone meanwhile; and
    ADOPT's momenta, whose gradients v divides, if v is not. Replicas are so alike, and beta2 so near to 1, that Adam's
    momenta land as they are: to hold them to v when they land late is not what it is to hold them at once."""
    never = {"u1": None, "u2": None, "v": None}
    for periods in ({"x": 4, "u1": 4, "u2": 8, "v": 4}, {"x": 4, **never}, {"x": 4, "u1": 8, "u2": 4, "v": None}):
        late = Setting(rule, periods, [0.9, 0.99], [0.5, 0.3], beta2=0.999, weight_decay=0.1, delay=delay)
        steps = 8 + delay  # those launched after 8 steps land in the last
        ours = run_ours(late, steps=steps, gradient=of_step)
        prompt = expected(replace(late, delay=1), steps=steps, gradient=of_step)
        exact = ["exp_avg_sq"] if rule != "sgdm" else []
        exact += ["exp_avg", "exp_avg_2"] if rule != "adopt" or periods["v"] is None else []
        exact += ["params"] if periods["u1"] is None else []
        pick = lambda world: [{name: states[name] for name in exact} for states in world]
        assert_equal(pick(ours), pick(prompt), 1e-12)


def test_identical_replicas_with_identical_data_are_one_replica():
    s, same = Setting("adam", EVERY, [0.9], [1.0], delay=3), lambda replica, step, x: noisy_quadratic(0, step, x)
    alone = run_ours(replace(s, delay=1), replicas=1, gradient=same)[0]
    for replica in run_ours(s, replicas=2, gradient=same):
        assert all(torch.allclose(replica[name], alone[name], rtol=1e-13, atol=1e-15) for name in alone)


SKIPS = {(0, 4), (0, 5), (1, 9), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)}


@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_only_updates_count_not_the_steps_that_a_replica_skips(rule):
    """The first of ADOPT's updates may fall between launch and landing: it sets v, of which nothing is left."""
    s = Setting(rule, EVERY, [0.9, 0.99], [0.5, 0.3], weight_decay=0.1, delay=3)
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    of = lambda m, t, x: None if (m, t) in SKIPS else [noisy_quadratic(m, t, x[0])]
    world = train([s], [start], 3, STEPS, of)

    def replica(average):
        (p,) = params = [torch.nn.Parameter(start.clone())]
        optimizer = DesLoc(params, blocks(s, wire_dtype="float64"), transport=average)
        for step in range(STEPS):
            if (average.rank, step) in SKIPS:
                optimizer.skip_step()
            else:
                p.grad = noisy_quadratic(average.rank, step, p.detach())
                optimizer.step()
        return {"params": p.detach(), "exp_avg": optimizer.state[p]["exp_avg"]}

    assert_equal(threads(3, replica), [{"params": groups[0].x, "exp_avg": groups[0].u[0]} for groups in world], 1e-12)


def trained(average, one_by_one, steps=14):
    """Two groups with periods of their own, stepped at once or, as ZeRO does, one after the other; one joins after step
    2."""
    weights, bias, late = (torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (5, 3, 2))
    groups = [{"params": [weights]}, {"params": [bias], "weight_decay": 0.1, "sync_every": {"params": 6}}]
    optimizer = DesLoc(groups, settings(wire_dtype="float64"), transport=average)
    for step in range(steps):
        if step == 2:
            optimizer.add_param_group({"params": [late]})
        params = [p for group in optimizer.param_groups for p in group["params"]]
        give_gradients(params, step, average.rank)
        if step in (5, 6):
            bias.grad = None  # ages, without an update
        if one_by_one:
            groups = optimizer.param_groups
            for group in groups:
                optimizer.param_groups = [group]
                optimizer.step()
            optimizer.param_groups = groups
        else:
            optimizer.step()
    return torch.cat([p.detach() for p in params])


def test_groups_cohorts_and_parameters_without_gradient():
    for at_once, one_by_one in zip(threads(2, lambda a: trained(a, False)), threads(2, lambda a: trained(a, True))):
        assert torch.equal(at_once, one_by_one)


def test_drift_is_between_what_was_launched_and_its_mean():
    def replica(average):
        p, found = torch.nn.Parameter(torch.full((5,), 1.0 + 2 * average.rank)), []
        optimizer = DesLoc(
            [p], settings(lr=0.0), transport=average, on_average=lambda event: found.append((event.steps, event.drift))
        )
        for step in range(7):
            give_gradients([p], step, average.rank)
            optimizer.step()
        return found, p.detach()

    for found, value in threads(2, replica):
        assert [steps for steps, _ in found] == [4] and found[0][1]["params"] == Drift(0.5, pytest.approx(1.0))
        assert (value == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_states_land_too(dtype):
    def replica(average):
        p = torch.nn.Parameter(torch.ones(50, dtype=dtype))
        config = settings()
        config["optimizer"]["params"]["state_dtype"] = "bfloat16"
        optimizer = DesLoc([p], config, transport=average)
        for step in range(12):
            give_gradients([p], step, average.rank)
            optimizer.step()
        return optimizer.state[p]["exp_avg"], p.dtype

    one, other = threads(2, replica)
    assert one[0].dtype == torch.bfloat16 and one[1] == dtype and not torch.equal(one[0], other[0])


def test_nan_stops_every_replica_and_is_not_written():
    def replica(average):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = DesLoc([p], settings(), transport=average)
        for step in range(9):
            give_gradients([p], step, average.rank)
            if (average.rank, step) == (1, 1):
                p.grad[0] = math.nan
            try:
                optimizer.step()
            except NonFiniteError as error:
                return step, str(error), p.isfinite().all().item()

    results = threads(3, replica)
    assert [step for step, _, _ in results] == [6] * 3 and [finite for _, _, finite in results] == [True, False, True]
    assert all(
        "after step 4: expected finite values, got NaN or inf from rank(s) [1]" in message for _, message, _ in results
    )


def test_after_a_load_what_flew_is_averaged_as_it_is_when_it_should_land():
    def replica(average):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = DesLoc([p], settings(), transport=average)
        for step in range(5):  # the average of step 4 is in flight
            give_gradients([p], step, average.rank)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        assert not optimizer.averaging.flights.delayed
        optimizer.skip_step()
        before = p.detach().clone()
        optimizer.skip_step()
        return before, p.detach()

    (one, mean), (other, same) = threads(2, replica)
    assert torch.allclose(mean, (one + other) / 2) and torch.allclose(mean, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("deslo", "params", "expected"),
    [
        ({"sync_delay": 0}, {}, "deslo.sync_delay: expected a whole number >= 1, got 0 (int)"),
        (
            {"sync_delay": 2, "overlap_comm": False},
            {},
            "deslo.sync_delay: expected 1 without overlap_comm, got 2; remove it, or take average_at",
        ),
        ({"sync_delay": 2, "average_at": "after_step"}, {}, "deslo.sync_delay: expected 1 without overlap_comm, got 2"),
        (
            {"sync_delay": 5},
            {"sync_every": {"params": 4}},
            "deslo.sync_delay: expected at most 4, the period of params, got 5; lower it",
        ),
        ({"sync_delay": 5}, {"sync_every": {"exp_avg": 3}}, "expected at most 3, the period of exp_avg, got 5"),
        (
            {"sync_delay": 2},
            {"outer_optimizer": {}},
            "deslo.sync_delay: expected 1 with outer_optimizer, got 2; remove one",
        ),
        (
            {"sync_delay": 2},
            {"reset_momenta": True, "sync_every": {"exp_avg": None, "exp_avg_sq": None}},
            "1 with reset_momenta",
        ),
    ],
)
def test_what_cannot_land_late_is_refused(deslo, params, expected):
    with pytest.raises(ConfigError) as error:
        load_config({"optimizer": {"params": params}, "deslo": deslo})
    assert expected in str(error.value)


def test_a_group_with_a_shorter_period_and_a_stock_optimizer_are_refused():
    with pytest.raises(
        ConfigError, match="deslo.sync_delay: expected at most 2, the period of params of param group 0, got 3"
    ):
        DesLoc([{"params": [torch.nn.Parameter(torch.ones(1))], "sync_every": {"params": 2}}], settings())
    with pytest.raises(ConfigError, match="deslo.sync_delay: expected 1 with a stock optimizer, got 3"):
        load_config({"deslo": {"sync_every": {"params": 8}, "sync_delay": 3}})
