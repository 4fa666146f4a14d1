"""Simulated replicas are the optimizer's own: against the float64 oracle, and as they come and go."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch

from deslo_plugin import ConfigError, NonFiniteError
from deslo_plugin.simulation import Failures, Growth, Logistic, Replicas, simulate
from tests.support.oracle import Setting, Switch, blocks, states, train
from tests.support.quadratic import noisy_quadratic, rare
from tests.support.theory import RULES, cut

REPLICAS, STEPS, SIZE, CLIP = 4, 25, 17, 3.0
START = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
ADAM = {"optimizer": {"params": {"lr": 0.01, "sync_every": {"params": 4, "exp_avg": 8, "exp_avg_sq": 12}}}}
VARIANTS = RULES | {
    "after_update": Setting("adam", {"x": 3, "u1": 2, "v": 7}, [0.9], [1.0], after_update=True),
    "delay": Setting("adopt", {"x": 3, "u1": 4, "v": 7}, [0.9], [0.8], delay=3, weight_decay=0.1),
    "outer": Setting("adam", {"x": 3, "u1": 2, "v": 7}, [0.9], [1.0], outer=(0.7, 0.9)),
    "fragments": cut(Setting("adam", {"x": 3, "u1": 4, "v": 7}, [0.9], [1.0]), 3),
    "fragments with an outer step": cut(Setting("adam", {"x": 4, "u1": 4, "v": 7}, [0.9], [1.0], outer=(0.7, 0.9)), 4),
    "switch": Setting("adam", {"x": 3, "u1": 2, "v": 7}, [0.9], [1.0], switch=Switch(8, [0.99], [0.95], 2.0, (1,))),
    "reset": Setting("adam", {"x": 3, "u1": None, "v": None}, [0.9], [1.0], reset=True),
}


class Bowls:
    """The oracle's gradients, as the slopes of a linear loss."""

    start = START

    def __init__(self, gradient=noisy_quadratic):
        self.gradient = gradient

    def losses(self, x, replicas, step):
        slopes = [self.gradient(m, step, row.detach()) for m, row in zip(replicas, x)]
        return (torch.stack(slopes) * x).sum(1)

    def evaluate(self, x):
        return x.square().sum(1)


def last(*args, **options):
    """The last moment of a simulation."""
    for moment in simulate(*args, **options):
        pass
    return moment


def double(config):
    return config | {"deslo": {"wire_dtype": "float64"} | config.get("deslo", {})}


@pytest.mark.parametrize("gradient", [noisy_quadratic, rare])
@pytest.mark.parametrize("synchronous_steps", [0, 5])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_rule_and_variant_is_the_oracle_in_float64(name, synchronous_steps, gradient):
    s = VARIANTS[name]
    config = blocks(s, wire_dtype="float64", synchronous_steps=synchronous_steps)
    replicas = last(Bowls(gradient), config, replicas=REPLICAS, steps=STEPS, norm_clip=CLIP).replicas
    theory = train(
        [s],
        [START],
        REPLICAS,
        STEPS,
        lambda m, t, x: [gradient(m, t, x[0])],
        norm_clip=CLIP,
        synchronous_steps=synchronous_steps,
    )
    for m, groups in enumerate(theory):
        for state, expected in states(s, groups[0]).items():
            error = (replicas.state(state)[m] - expected).abs().max()
            assert error <= 1e-12 * expected.abs().max().clamp(min=1.0), f"{state} of replica {m}: {error:.3g}"


@pytest.mark.parametrize(("replicas", "rate"), [(1, 0.5), (2, 0.6), (4, 0.6), (8, 0.8)])
def test_an_outer_rate_that_is_not_given_goes_by_the_number_of_replicas(replicas, rate):
    """Those of arXiv 2503.09799 at 30 steps between averages; in the oracle, the rate that is written out."""
    s = Setting("adam", {"x": 4, "u1": None, "v": None}, [0.9], [1.0], outer=(rate, 0.9))
    config = blocks(s, wire_dtype="float64")
    del config["optimizer"]["params"]["outer_optimizer"]["lr"]
    world = last(Bowls(), config, replicas=replicas, steps=STEPS).replicas
    theory = train([s], [START], replicas, STEPS, lambda m, t, x: [noisy_quadratic(m, t, x[0])])
    expected = torch.stack([states(s, groups[0])["params"] for groups in theory])
    torch.testing.assert_close(world.state("params"), expected, rtol=0, atol=1e-12)


def test_bytes_are_one_replicas():
    world = last(Bowls(), double(ADAM), replicas=3, steps=13, membership=Growth(at=9, count=2)).replicas
    each, word = 8 * SIZE, 8  # the word by which replicas ask each other whether an average may land
    assert world.optimizer.stats.bytes == {"params": 3 * (each + word), "exp_avg": each, "exp_avg_sq": each}


@pytest.mark.parametrize("momenta", [True, False])
def test_who_joins_gets_the_mean_and_changes_no_mean(momenta):
    world = last(Bowls(), double(ADAM), replicas=3, steps=10).replicas
    before = {name: world.state(name) for name in ("params", "exp_avg", "exp_avg_sq")}
    world.join([7, 5], momenta=momenta)
    assert world.ids == [0, 1, 2, 5, 7] and world.steps == 10
    for name, rows in before.items():
        after = world.state(name)
        mean = rows.mean(0) if momenta or name == "params" else torch.zeros(SIZE)
        assert torch.equal(after[:3], rows)
        assert all(torch.allclose(row, mean.to(row), rtol=0, atol=1e-15) for row in after[3:])
        if momenta or name == "params":
            assert torch.allclose(after.mean(0), rows.mean(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("rule", ["adam", "adopt"])
def test_a_joiner_without_momenta_steps_as_a_new_replica_does(rule):
    config = {
        "optimizer": {"params": {"rule": rule, "sync_every": {"params": 1000}}},
        "deslo": {"wire_dtype": "float64"},
    }
    world = last(Bowls(), config, replicas=3, steps=10).replicas
    world.join([3], momenta=False)
    fresh = Replicas(world.state("params")[3], config, 1)
    for step in range(5):
        slopes = torch.stack([noisy_quadratic(m, step, row) for m, row in zip(world.ids, world.state("params"))])
        fresh.step(slopes[3:].clone())
        world.step(slopes)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(world.state(name)[3], fresh.state(name)[0])


@pytest.mark.parametrize("rule", ["adam", "adopt"])
def test_a_joiner_with_everything_goes_on_as_the_one_it_joined(rule):
    params = {"rule": rule, "sync_every": {"params": 1000}}
    world = last(Bowls(), double({"optimizer": {"params": params}}), replicas=1, steps=3).replicas
    world.join([1])
    for step in range(3, 6):
        world.step(noisy_quadratic(0, step, world.state("params")[0]).expand(2, -1).clone())
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(*world.state(name))


@pytest.mark.parametrize("fragments", [1, 2])
def test_what_left_is_freed_with_the_averages_that_it_flew_in(fragments):
    config = double(ADAM | {"deslo": {"fragments": fragments}})
    world = last(Bowls(), config, replicas=3, steps=4).replicas  # an average of params is in flight
    old = weakref.ref(world.optimizer.param_groups[0]["params"][0])
    world.leave([1])
    gc.collect()
    assert old() is None


def test_everyone_keeps_their_own_row_however_they_came():
    world = last(Bowls(), double(ADAM), replicas=3, steps=10).replicas

    def rows():
        return {name: dict(zip(world.ids, world.state(name))) for name in ("params", "exp_avg", "exp_avg_sq")}

    before, counts = rows(), []
    for change in (lambda: world.join([3], momenta=False), lambda: world.join([4]), lambda: world.leave([0, 3])):
        change()
        counts.append(len(world.ids))
        now = rows()
        for name, owned in now.items():
            assert all(
                torch.equal(row, before[name][replica]) for replica, row in owned.items() if replica in before[name]
            )
        before = now
    assert counts == [4, 5, 3] and sorted(world.ids) == [1, 2, 4] and world.away == {0: 10, 3: 10}


@pytest.mark.parametrize("when", ["before_step", "after_step"])
def test_averages_are_over_those_that_are_there(when):
    # two that train on after a third has left are two that never knew it, once they have met the same start
    gone = lambda steps, replicas: steps == 10 and replicas.leave([1])
    config = double(ADAM | {"deslo": {"average_at": when}})
    left = last(Bowls(), config, replicas=3, steps=10).replicas
    rows, moments = left.state("params"), {name: left.state(name) for name in ("exp_avg", "exp_avg_sq")}
    went_on = last(Bowls(), config, replicas=3, steps=12 + (when == "before_step"), membership=gone).replicas
    assert went_on.ids == [0, 2] and went_on.away == {1: 10}
    x, u, v = ([each[0], each[2]] for each in (rows, moments["exp_avg"], moments["exp_avg_sq"]))
    for t in (10, 11):
        for i, m in enumerate((0, 2)):
            g = noisy_quadratic(m, t, x[i])
            u[i], v[i] = 0.9 * u[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
            x[i] = x[i] - 0.01 * u[i] / (1 - 0.9 ** (t + 1)) / ((v[i] / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
    if when == "after_step":
        assert torch.allclose(went_on.state("params"), torch.stack(x).mean(0).expand(2, -1), rtol=0, atol=1e-12)
    else:  # step 12 averages v and params first, then moves
        for i, m in enumerate((0, 2)):
            g = noisy_quadratic(m, 12, x[i])
            assert torch.allclose(
                went_on.state("exp_avg_sq")[i], 0.95 * (v[0] + v[1]) / 2 + 0.05 * g * g, rtol=0, atol=1e-12
            )


def test_failures_take_a_share_and_heal_at_an_average_of_params():
    seen, failures = [set(range(8))], Failures(every=7, share=0.25, absent=5, seed=3)
    for moment in simulate(Bowls(), double(ADAM), replicas=8, steps=27, membership=failures):
        seen.append(set(moment.replicas.ids))
    lost = {step: len(before - after) for step, (before, after) in enumerate(pairwise(seen)) if before - after}
    healed = {step: len(after - before) for step, (before, after) in enumerate(pairwise(seen)) if after - before}
    assert lost == {7: 2, 14: 2, 21: 2}  # a quarter of 8, of 8, and of 8
    assert healed == {12: 2, 20: 2}  # the first averages of params 5 steps later or more; the last two are away


def test_failures_are_alike_for_every_algorithm_and_heal_to_the_mean_of_the_survivors():
    populations = []
    for momenta in (True, False):
        ids = []
        for moment in simulate(
            Bowls(),
            double(ADAM),
            replicas=6,
            steps=30,
            membership=Failures(every=7, share=0.3, absent=1, momenta=momenta),
        ):
            ids.append(sorted(moment.replicas.ids))
        populations.append(ids)
    assert populations[0] == populations[1]


def test_membership_in_the_middle_of_a_flight_changes_nothing_but_who_is_there():
    come_and_go = lambda steps, replicas: (replicas.join([9]), replicas.leave([9])) if steps == 12 else None
    for s in (RULES["mt-dao-adam-n2"], VARIANTS["after_update"]):
        undisturbed, disturbed = (
            last(Bowls(), blocks(s, wire_dtype="float64"), replicas=3, steps=STEPS, membership=each).replicas
            for each in (lambda steps, replicas: None, come_and_go)
        )
        assert torch.equal(undisturbed.state("params"), disturbed.state("params"))


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match="on_nonfinite"):
        Replicas(START, double(ADAM | {"deslo": {"on_nonfinite": "skip"}}), 2)
    with pytest.raises(ConfigError, match="stock optimizer"):
        Replicas(START, {"deslo": {"sync_every": {"params": 4}}}, 2)
    with pytest.raises(ValueError, match=r"shape \(n,\)"):
        Replicas(START.view(1, -1), double(ADAM), 2)
    world = Replicas(START, double(ADAM), 2)
    for ids in ([0, 1], [5]):
        with pytest.raises(ValueError, match="leave"):
            world.leave(ids)
    with pytest.raises(ValueError, match="join"):
        world.join([1])


def test_nan_on_one_replica_stops_the_average():
    class Broken(Bowls):
        def losses(self, x, replicas, step):
            return super().losses(x, replicas, step) * torch.tensor(
                [1.0] * (len(x) - 1) + [float("nan")], dtype=x.dtype
            )

    with pytest.raises(NonFiniteError):
        last(Broken(), double(ADAM), replicas=3, steps=6)


def test_logistic_regression_learns_the_weights_of_all():
    objective = Logistic(torch.ones(5), batch=16, replicas=8, heterogeneity=0.5)
    start = float(objective.evaluate(objective.start[None]))
    config = {"optimizer": {"params": {"lr": 0.05, "sync_every": {"params": 8}}}}
    replicas = last(objective, config, replicas=8, steps=150).replicas
    end = float(objective.evaluate(replicas.state("params").mean(0, keepdim=True)))
    assert start == pytest.approx(0.6931, abs=1e-3) and end < 0.75 * start
