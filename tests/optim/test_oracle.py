"""DesLoc against the float64 oracle: every rule, number of momenta, order and uneven periods."""

import pytest
import torch

from tests.support.oracle import Setting
from tests.support.quadratic import MOMENTA, REPLICAS, assert_equal, expected, noisy_quadratic, rare, run_ours

PERIODS = {"x": 3, "u1": 2, "u2": 5, "u3": None, "v": 7}


@pytest.mark.parametrize("after_update", [False, True], ids=["before_step", "after_step"])
@pytest.mark.parametrize("momenta", MOMENTA)
@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_every_rule_and_order_is_the_oracle_in_float64(rule, momenta, after_update):
    betas, weights = MOMENTA[momenta]
    s = Setting(rule, PERIODS, betas, weights, weight_decay=0.1, after_update=after_update)
    assert_equal(run_ours(s), expected(s), 1e-12)


@pytest.mark.parametrize("after_update", [False, True], ids=["before_step", "after_step"])
@pytest.mark.parametrize("momenta", MOMENTA)
@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_rare_gradients_are_those_of_the_oracle(rule, momenta, after_update):
    betas, weights = MOMENTA[momenta]
    s = Setting(rule, PERIODS, betas, weights, weight_decay=0.1, after_update=after_update)
    assert_equal(run_ours(s, gradient=rare), expected(s, gradient=rare), 1e-12)


@pytest.mark.parametrize("after_update", [False, True], ids=["before_step", "after_step"])
@pytest.mark.parametrize("momenta", ["one", "two and a rest", "three"])
@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_every_rule_and_order_is_the_oracle_in_float32(rule, momenta, after_update):
    betas, weights = MOMENTA[momenta]
    s = Setting(rule, PERIODS, betas, weights, eps=1e-4, lr=1e-3, after_update=after_update)
    assert_equal(run_ours(s, dtype=torch.float32), expected(s), 1e-6)


@pytest.mark.parametrize("rule", ["adam", "adopt"])
@pytest.mark.parametrize(
    "change",
    [
        {"value_clip": 0.5},
        {"bias_correction": False},
        {"outer": (0.7, 0.9)},
        {"outer": (1.0, 0.0)},
        {"reset": True, "periods": {"x": 4, "u1": None, "u2": None, "v": None}},
        {"periods": {"x": 4, "u1": None, "u2": None, "v": None}},
        {"periods": {"x": 1, "u1": 1, "u2": 1, "v": 1}},
        {"periods": {"x": 4, "u1": 4, "u2": 4, "v": 4}, "after_update": True, "outer": (0.7, 0.9)},
    ],
    ids=str,
)
def test_variants_are_the_oracle(rule, change):
    if rule == "adopt" and "bias_correction" in change:
        change = {}
    s = Setting(**({"rule": rule, "periods": PERIODS, "betas": [0.9, 0.99], "weights": [0.5, 0.3]} | change))
    assert_equal(run_ours(s), expected(s), 1e-12)
    assert_equal(run_ours(s, gradient=rare), expected(s, gradient=rare), 1e-12)


@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_overlap_changes_no_bit(rule):
    s, options = Setting(rule, PERIODS, [0.9, 0.99], [0.5, 0.3]), {"dtype": torch.float32, "gradient": rare}
    for with_overlap, without in zip(run_ours(s, **options), run_ours(s, overlap=False, **options)):
        assert all(torch.equal(with_overlap[name], without[name]) for name in without)


@pytest.mark.parametrize("after_update", [False, True], ids=["before_step", "after_step"])
def test_identical_replicas_with_identical_data_are_one_replica(after_update):
    s = Setting("adam", PERIODS, [0.9, 0.99], [0.5, 0.3], after_update=after_update)
    same = lambda replica, step, x: noisy_quadratic(0, step, x)
    alone = run_ours(s, replicas=1, gradient=same)[0]
    for replica in run_ours(s, replicas=2, gradient=same):
        assert all(torch.equal(replica[name], alone[name]) for name in alone)


def test_sgdm_averaged_every_step_after_the_update_is_synchronous_training():
    s = Setting("sgdm", {"x": 1, "u1": 1}, [0.9], [1.0], after_update=True)
    synchronous = Setting("sgdm", {"x": None, "u1": None}, [0.9], [1.0])
    mean = lambda _, step, x: sum(noisy_quadratic(m, step, x) for m in range(REPLICAS)) / REPLICAS
    one = expected(synchronous, replicas=1, gradient=mean)
    assert_equal(run_ours(s), one * REPLICAS, 1e-12)


def test_adam_averaged_every_step_is_not_synchronous_training():
    s = Setting("adam", {"x": 1, "u1": 1, "v": 1}, [0.9], [1.0], after_update=True)
    synchronous = Setting("adam", {"x": None, "u1": None, "v": None}, [0.9], [1.0])
    mean = lambda _, step, x: sum(noisy_quadratic(m, step, x) for m in range(REPLICAS)) / REPLICAS
    one = expected(synchronous, replicas=1, gradient=mean)[0]
    assert (run_ours(s)[0]["exp_avg_sq"] - one["exp_avg_sq"]).abs().max() > 1e-3
