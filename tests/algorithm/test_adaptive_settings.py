"""Settings of periods that follow drift: what is said of them, and what every mistake is told."""

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc, load_config
from deslo_plugin.algorithm.adaptive_periods import Adaptive
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.planning.plan import make_plan


def test_the_banner_says_the_bounds():
    adaptive = {"adaptive": {"max": 64, "drift": 0.3}}
    config = load_config(
        {
            "optimizer": {"params": {"sync_every": {"params": 8, "exp_avg": adaptive, "exp_avg_sq": "adaptive"}}},
            "deslo": {"replica_size": 2},
        }
    )
    plan = make_plan(config, [1000], [config.optimizer.periods], contiguous(4, 0, 2))
    text = plan.describe()
    for words in (
        "exp_avg: adaptive, every 8 to 64 steps for drift 0.3 (given), 4,008 bytes",
        "exp_avg_sq: adaptive, every 8 to 128 steps for drift 0.5 (given), 4,008 bytes",
        "0.1484 to 0.375 parameter vectors per step between replicas: 2.7 to 6.7 times fewer than synchronous",
    ):
        assert words in text, text
    assert plan.bytes_at(8) == {"params": 4004, "exp_avg": 4008, "exp_avg_sq": 4008} and plan.bytes_at(12) == {}


def test_param_groups_have_bounds_of_their_own():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    adaptive = {"adaptive": {"min": 6, "max": 12, "drift": 0.2}}
    groups = [{"params": weights[:1]}, {"params": weights[1:], "sync_every": {"params": 3, "exp_avg": adaptive}}]
    optimizer = DesLoc(groups, lr=1e-2, sync_every={"params": 4})
    assert optimizer.param_groups[0]["sync_every"]["exp_avg"] == 12
    assert optimizer.param_groups[1]["sync_every"]["exp_avg"] == Adaptive(6, 12, 0.2)


@pytest.mark.parametrize(
    "every, deslo, complaint",
    [
        (
            {"exp_avg": "adaptiv"},
            {},
            "sync_every.exp_avg: expected a whole number >= 1, 'half_life', null, got 'adaptiv'",
        ),
        (
            {"params": "adaptive"},
            {},
            "sync_every.params: expected a whole number >= 1, got 'adaptive' (str); give steps: adaptive",
        ),
        ({"exp_avg": {"adaptiv": {}}}, {}, "sync_every.exp_avg.adaptiv: expected a known key (adaptive)"),
        (
            {"exp_avg": {"adaptive": {"maximum": 64}}},
            {},
            "exp_avg.adaptive.maximum: expected a known key (drift, max, min)",
        ),
        (
            {"exp_avg": {"adaptive": {"min": 12}}},
            {},
            "exp_avg.adaptive.min: expected a multiple of 8, the period of params, got 12",
        ),
        (
            {"exp_avg": {"adaptive": {"max": 48}}},
            {},
            "exp_avg.adaptive.max: expected 8 (min) times 2, 4, 8, ..., got 48",
        ),
        ({"exp_avg": {"adaptive": {"max": 8}}}, {}, "exp_avg.adaptive.max: expected 8 (min) times 2, 4, 8, ..., got 8"),
        ({"exp_avg": {"adaptive": {"drift": 0}}}, {}, "exp_avg.adaptive.drift: expected a number > 0, got 0"),
        (
            {"exp_avg": {"adaptive": {"drift": "low"}}},
            {},
            "exp_avg.adaptive.drift: expected a number >= 0, got 'low' (str)",
        ),
        (
            {"exp_avg_sq": "adaptive"},
            {"replica_weights": "samples"},
            'deslo.replica_weights: expected "uniform" with an adaptive period of exp_avg_sq',
        ),
        ({"exp_avg": "adaptive"}, {"sync_delay": 9}, "deslo.sync_delay: expected at most 8, the period of params"),
    ],
    ids=str,
)
def test_mistakes_say_what_to_do(every, deslo, complaint):
    with pytest.raises(ConfigError) as error:
        load_config({"optimizer": {"params": {"sync_every": {"params": 8} | every}}, "deslo": deslo})
    assert complaint in str(error.value)


def test_a_group_that_meets_otherwise_needs_a_period_of_its_own():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(
        ConfigError, match="param group 0.sync_every.exp_avg: expected a multiple of 3, this group's period of params"
    ):
        DesLoc([{"params": [weight], "sync_every": {"params": 3}}], sync_every={"params": 8, "exp_avg": "adaptive"})


def test_a_stock_optimizer_has_fixed_periods():
    with pytest.raises(
        ConfigError, match="deslo.sync_every.exp_avg: .*got 'adaptive' .*periods adapt with DesLoc only"
    ):
        load_config({"deslo": {"sync_every": {"params": 2, "exp_avg": "adaptive"}}})
