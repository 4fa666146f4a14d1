"""Periods that follow drift: the rule, the float64 oracle, one decision on all ranks of every framework, resumes, the
plan."""

import logging

import pytest
import torch

from deslo_plugin import DesLoc
from deslo_plugin.algorithm.adaptive_periods import Adaptive
from deslo_plugin.simulation import Replicas
from deslo_plugin.telemetry.report.page import rows
from deslo_plugin.telemetry.report.run import Run
from tests.support import adaptive_jobs, checkpoint_jobs
from tests.support.checkpoint_configs import same
from tests.support.engine_configs import ds_config
from tests.support.oracle import Setting, blocks
from tests.support.quadratic import assert_equal, expected, run_ours
from tests.support.theory import assert_oracle, oracle_states
from tests.support.worlds import threads

S = Setting(
    "adam", {"x": 3, "u1": 6, "v": 6}, [0.9], [1.0], eps=1e-3, lr=3e-2, adaptive={"u1": (12, 1.4), "v": (24, 0.32)}
)
STEPS = 61
KINDS = ["plain", "ddp", "fsdp", "hsdp", "zero 0", "zero 1", "zero 2", "zero 3"]


def config_for(kind: str, s: Setting = S, **deslo) -> dict:
    if kind.startswith("zero"):
        return ds_config(s, int(kind[-1]), deslo=deslo)
    return blocks(s, **({"replica_size": 2} if kind == "ddp" else {}), **deslo)


def test_a_period_halves_when_late_and_doubles_when_early_within_its_bounds():
    bounds = Adaptive(min=8, max=32, drift=0.5)
    assert [bounds.after(32, 16, drift) for drift in (0.0, 0.24, 0.25, 0.5, 0.51, float("inf"))] == [
        32,
        32,
        16,
        16,
        8,
        8,
    ]
    assert bounds.after(16, 16, 0.1) == 16  # 32 are not complete: the next average is after 16 more in any case
    assert bounds.after(64, 32, 0.1) == 32 and bounds.after(8, 8, 9.0) == 8
    assert [bounds.allowed(period) for period in (0, 8, 20, 32, 999)] == [8, 8, 16, 32, 32]


def test_it_goes_by_the_drift_over_all_replicas():
    """Momenta of 1 and 3 are half their mean away from it: right for a drift of 0.6, early for 1.5, late for 0.4."""

    def steps_of_averages(average, drift):
        found = []
        momentum = {"min": 1, "max": 4, "drift": drift}
        config = {
            "optimizer": {"params": {"rule": "sgdm", "sync_every": {"params": 1, "exp_avg": {"adaptive": momentum}}}},
            "deslo": {"average_at": "after_step"},
        }
        weight = torch.nn.Parameter(torch.zeros(7))
        optimizer = DesLoc(
            [weight],
            config,
            transport=average,
            on_average=lambda event: found.extend([event.steps] * ("exp_avg" in event.drift)),
        )
        for _ in range(16):
            optimizer.state[weight]["exp_avg"].fill_(1.0 + 2 * average.rank)
            optimizer.skip_step()
        return found

    for drift, steps in ((0.6, [*range(1, 17)]), (1.5, [1, 2, 4, 8, 12, 16]), (0.4, [*range(1, 17)])):
        assert threads(2, lambda average: steps_of_averages(average, drift)) == [steps, steps]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"after_update": True},
        {"delay": 2},
        {"rule": "adopt", "lr": 1e-3},
        {
            "betas": [0.9, 0.99],
            "weights": [0.5, 0.3],
            "periods": {"x": 2, "u1": None, "u2": 2, "v": 4},
            "adaptive": {"u2": (16, 0.6)},
        },
        {"betas": [0.5], "adaptive": {"u1": (32, 2.5)}},
    ],
    ids=str,
)
def test_training_is_the_oracles(change):
    adaptive = {"u1": (16, 1.0), "v": (32, 0.4)}
    s = Setting(
        **{
            "rule": "adam",
            "periods": {"x": 2, "u1": 2, "v": 4},
            "betas": [0.9],
            "weights": [1.0],
            "eps": 1e-3,
            "adaptive": adaptive,
        }
        | change
    )
    fixed = Setting(**vars(s) | {"adaptive": {}})
    assert_equal(run_ours(s, steps=90), expected(s, steps=90), 1e-11)
    assert (run_ours(fixed, steps=90)[0]["params"] - run_ours(s, steps=90)[0]["params"]).abs().max() > 1e-6


def test_simulated_replicas_decide_as_separate_ones_and_keep_their_periods_when_one_leaves():
    adaptive = {"adaptive": {"min": 2, "max": 16, "drift": 0.9}}
    config = {
        "optimizer": {"params": {"sync_every": {"params": 2, "exp_avg": adaptive, "exp_avg_sq": adaptive}}},
        "deslo": {"wire_dtype": "float64"},
    }
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, 3, 9, generator=generator, dtype=torch.float64) + 1.0

    def separate(average):
        weight, found = torch.nn.Parameter(torch.zeros(9, dtype=torch.float64)), []
        optimizer = DesLoc([weight], config, transport=average)
        for each in gradients:
            weight.grad = each[average.rank].clone()
            optimizer.step()
            found.append(dict(optimizer.averaging.periods(optimizer.param_groups[0])))
        return found

    world, found = Replicas(torch.zeros(9, dtype=torch.float64), config, 3), []
    for each in gradients:
        world.step(each.clone())
        found.append(dict(world.optimizer.averaging.periods(world.optimizer.param_groups[0])))
    assert threads(3, separate) == [found] * 3 and len({str(each) for each in found}) > 2
    world.leave([1])
    world.step(gradients[0, :2].clone())
    assert world.optimizer.averaging.periods(world.optimizer.param_groups[0]) == found[-1] != found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_of_every_framework_decide_alike_train_as_the_oracle_and_send_what_was_planned(four, kind):
    results = four().run(adaptive_jobs.run, kind, config_for(kind), STEPS)
    assert_oracle(results, oracle_states(S, STEPS, replicas=4 if kind == "plain" else 2))
    assert all(
        result["schedule"] == results[0]["schedule"] and result["periods"] == results[0]["periods"]
        for result in results
    )
    periods = {
        state: [[now[group][state] for now in results[0]["periods"]] for group in (0, 1)]
        for state in ("exp_avg", "exp_avg_sq")
    }
    assert all(each == sorted(each) and each[0] < each[-1] for each in periods["exp_avg_sq"])
    assert kind == "plain" or any(each != sorted(each) for each in periods["exp_avg"])  # up, and back again
    for result in results:  # an average of both groups sends what the plan says; how many there are, between the bounds
        for state in ("exp_avg", "exp_avg_sq"):
            of_groups = sum(each[state] for each in result["each"])
            assert result["bytes"][state] <= result["planned"][state]
            assert result["planned"][state] % of_groups == 0 and result["bytes"][state] >= of_groups * (STEPS // 24)
            assert 0 < result["bytes"][state] <= of_groups * result["events"][state]
        assert result["bytes"]["params"] == result["planned"]["params"]


@pytest.mark.parametrize("change", [{"delay": 2}, {"after_update": True}], ids=str)
@pytest.mark.parametrize("kind", ["ddp", "hsdp", "zero 3"])
def test_in_other_orders_too(four, kind, change):
    s = Setting(**vars(S) | change)
    results = four().run(adaptive_jobs.run, kind, config_for(kind, s), STEPS)
    assert_oracle(results, oracle_states(s, STEPS))
    assert all(result["schedule"] == results[0]["schedule"] for result in results)


@pytest.mark.parametrize("kind", ["ddp", "hsdp", "zero 2"])
def test_overlap_changes_no_bit(four, kind):
    there, not_there = (
        four().run(adaptive_jobs.run, kind, config_for(kind, overlap_comm=on), STEPS) for on in (True, False)
    )
    for a, b in zip(there, not_there):
        same(a["states"], b["states"])


@pytest.mark.parametrize(
    "kind, before", [*((kind, 29) for kind in KINDS), ("plain", 24), ("plain", 30), ("zero 3", 30)]
)
def test_an_exact_resume_changes_no_bit(four, tmp_path, kind, before):
    fixed = Setting(**vars(S) | {"adaptive": {}})
    results = four().run(
        checkpoint_jobs.resumed, kind, config_for(kind), str(tmp_path / "c"), "per_replica", before, 31
    )
    others = four().run(checkpoint_jobs.unsaved, kind, config_for(kind, fixed), before + 31)
    for result, other in zip(results, others):
        same(result["straight"], result["loaded"])
        assert any(
            not torch.equal(mine, other["exp_avg_sq"][name]) for name, mine in result["straight"]["exp_avg_sq"].items()
        )


@pytest.mark.parametrize(
    "saver, loader", [("hsdp", "plain"), ("ddp", "zero 2"), ("zero 3", "fsdp 1x4"), ("fsdp", "zero 1")]
)
def test_an_average_goes_on_with_the_periods_that_it_was_saved_with(four, tmp_path, saver, loader):
    saved = four().run(adaptive_jobs.run, saver, config_for(saver), STEPS, str(tmp_path / "c"))
    for periods in four().run(adaptive_jobs.periods_after_load, loader, config_for(loader), str(tmp_path / "c"), 1):
        assert periods == saved[0]["periods"][-1] != saved[0]["periods"][0]


def test_kernels_that_may_round_otherwise_are_refused(four):
    for error in four().run(adaptive_jobs.refused_on_other_kernels, config_for("plain")):
        assert (
            "kernels, which measure what adaptive periods go by," in error and "another on cpu on rank(s) [3]" in error
        )


def test_a_change_is_logged(caplog):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = DesLoc([weight], lr=1e-2, sync_every={"params": 1, "exp_avg": "adaptive"})
    with caplog.at_level(logging.INFO, logger="deslo_plugin"):
        for _ in range(3):
            weight.grad = torch.ones(3)
            optimizer.step()
    assert "exp_avg is averaged every 2 steps now, after step 2 found drift 0 at every 1" in caplog.text
    assert [optimizer.averaging.periods(group)["exp_avg"] for group in optimizer.param_groups] == [2]


def test_telemetry_and_report_say_the_bounds_of_each_param_group(four, tmp_path):
    four().run(adaptive_jobs.run, "hsdp", config_for("hsdp", telemetry={"path": str(tmp_path)}), 14)
    run = Run(tmp_path)
    first = "3 / adaptive, every 6 to 12 steps for drift 1.4 / adaptive, every 6 to 24 steps for drift 0.32"
    assert ["periods", f"{first}; 2{first[1:]}"] in rows([run])
    assert sum(run.bytes.values()) > 0 and set(run.drift) == {"params", "exp_avg", "exp_avg_sq"}
