"""Optimizers that are not ours, their states on periods by name, on every framework."""

import re

import pytest
import torch

from deslo_plugin import ConfigError, load_config
from deslo_plugin.comm.transport import SingleReplica
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.any_optimizer_step import schedule
from tests.support import engine_error_jobs, torch_use_jobs
from tests.support import jobs as deepspeed_jobs
from tests.support import torch_jobs as jobs
from tests.support.engine_configs import ADAMW, SYNC_EVERY, stock_ds
from tests.support.theory import RULES, assert_oracle, oracle_states

WORLDS = {"plain": (4, "auto"), "ddp": (2, 2), "hsdp": (2, "auto")}


def adamw(model):
    return torch.optim.AdamW(jobs.stock_groups(model), **ADAMW)


def fused_adamw(model):
    return torch.optim.AdamW(jobs.stock_groups(model), **ADAMW, fused=True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def muon(model):
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)


def deslo(wrap, **more):
    return {"deslo": {"replica_size": WORLDS[wrap][1], "sync_every": SYNC_EVERY} | more}


@pytest.mark.parametrize("optimizer", [adamw, fused_adamw])
@pytest.mark.parametrize("wrap", WORLDS)
def test_adamw_trains_as_the_oracle(four, wrap, optimizer):
    results = four().run(jobs.run, wrap, deslo(wrap), 26, None, optimizer)
    theory = oracle_states(RULES["des-loc-adam"], 26, replicas=WORLDS[wrap][0], own_period=False)
    assert_oracle(results, theory)
    assert all(result["bytes"] == result["planned"] for result in results)


@pytest.mark.parametrize("more", [{"average_at": "after_step"}, {"synchronous_steps": 9}], ids=str)
@pytest.mark.parametrize("wrap", WORLDS)
def test_order_and_warm_up_are_those_of_the_oracle(four, wrap, more):
    s = type(RULES["des-loc-adam"])(**vars(RULES["des-loc-adam"]) | {"after_update": "average_at" in more})
    results = four().run(jobs.run, wrap, deslo(wrap, **more), 20, None, adamw)
    assert_oracle(
        results,
        oracle_states(
            s, 20, replicas=WORLDS[wrap][0], own_period=False, synchronous_steps=more.get("synchronous_steps", 0)
        ),
    )


def params_of_theory(steps, broken=None):
    return [
        {"params": replica["params"]}
        for replica in oracle_states(RULES["des-loc-adam"], steps, broken, own_period=False)
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adamw_of_a_deepspeed_json_trains_as_the_oracle(four, stage):
    results = four().run(deepspeed_jobs.run_stock, stock_ds(stage), 26)
    assert_oracle(results, params_of_theory(26))
    assert all(result["bytes"] == result["planned"] for result in results)


def test_a_skip_that_nobody_would_take_is_refused(four):
    ds = stock_ds(0)
    ds["deslo"]["on_nonfinite"] = "skip"
    for error in four().run(engine_error_jobs.raises, ds):
        assert 'deslo.on_nonfinite: expected "stop"' in error


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_deepspeed_skips_on_one_replica_still_ticks_and_averages(four, stage):
    results = four().run(deepspeed_jobs.run_stock, stock_ds(stage), 20, (1, 6))
    assert_oracle(results, params_of_theory(20, broken=(1, 6)))
    assert [result["skipped"] for result in results] == [0, 0, 1, 1]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_deepspeed_resume_in_the_middle_of_a_period_changes_no_bit(four, tmp_path, stage):
    for straight, resumed in four().run(deepspeed_jobs.resumed_stock, stock_ds(stage), str(tmp_path), 5, 9):
        for name, tensor in straight["states"]["params"].items():
            assert torch.equal(tensor, resumed["states"]["params"][name])


@pytest.mark.parametrize("optimizer, states", [(sgd, ["momentum_buffer"]), (muon, ["momentum_buffer"])])
def test_whatever_states_an_optimizer_has_are_averaged(four, optimizer, states):
    """After an average that is taken after the update replicas are equal in all that was averaged."""
    config = {"deslo": {"average_at": "after_step", "sync_every": {"params": 2} | dict.fromkeys(states, 4)}}
    at_4, at_6 = (four().run(torch_use_jobs.raw_states, "plain", config, steps, optimizer) for steps in (4, 6))
    for state in ("params", *states):
        assert all(torch.equal(mine, first) for one in at_4 for mine, first in zip(one[state], at_4[0][state]))
    assert not torch.equal(at_6[0][states[0]][0], at_6[1][states[0]][0])


@pytest.mark.parametrize("first", ["scheduler", "ours"])
def test_torchs_lr_schedulers_are_built_before_or_after(first):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    averaging = AnyOptimizerAverager(
        optimizer, load_config({"deslo": {"sync_every": SYNC_EVERY}}).deslo, SingleReplica()
    )
    if first == "ours":
        schedule(averaging)
    halved = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    if first == "scheduler":
        schedule(averaging)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        halved.step()
    assert averaging.steps == 3 and optimizer.param_groups[0]["lr"] == 0.125


def test_two_optimizers_of_one_model_have_their_own_periods(four):
    equal = four().run(torch_use_jobs.muon_and_adamw, 6)
    assert equal == [{"params": True, "momentum_buffer": True, "exp_avg": False, "exp_avg_sq": True}] * 4


@pytest.mark.parametrize(
    "sync_every, message",
    [
        (
            {"params": 3, "exp_avg": 6},
            "a period for every state of AdamW .exp_avg, exp_avg_sq., got none for exp_avg_sq",
        ),
        (SYNC_EVERY | {"exp_avg_square": 3}, "sync_every.exp_avg_square: .*did you mean 'exp_avg_sq'"),
    ],
)
def test_states_that_do_not_fit_the_schedule_are_named_after_the_first_step(four, sync_every, message):
    for error in four().run(jobs.raises, "plain", {"deslo": {"sync_every": sync_every}}, 2, None, adamw):
        assert re.search(message, error)


def test_a_state_that_has_no_mean_is_refused_unless_it_stays_local(four):
    for period, expected in ((2, "null: int8 values of Quantised have no mean, got 2"), (None, "no error")):
        config = {"deslo": {"sync_every": {"params": 2, "codes": period}}}
        for error in four().run(jobs.raises, "plain", config, 3, None, torch_use_jobs.quantised):
            assert expected in error


@pytest.mark.parametrize(
    "blocks, message",
    [
        ({"deslo": {"sync_every": {"exp_avg": 3}}}, "deslo.sync_every.params: expected a whole number >= 1"),
        (
            {"optimizer": {"type": "DesLoc"}, "deslo": {"sync_every": {"params": 3}}},
            "move it to optimizer.params.sync_every",
        ),
        (
            {"deslo": {"sync_every": {"params": 3, "exp_avg": "half_life"}}},
            "sync_every.exp_avg: expected a whole number >= 1, null",
        ),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(blocks, message):
    with pytest.raises(ConfigError, match=message):
        load_config(blocks)


def test_states_that_the_first_step_creates_are_due_after_it_and_nothing_is_sent_twice(four):
    every_step = {"deslo": {"sync_every": dict.fromkeys(("params", "exp_avg", "exp_avg_sq"), 1)}}
    for result in four().run(jobs.run, "plain", every_step, 4, None, adamw):
        assert result["bytes"] == result["planned"]
