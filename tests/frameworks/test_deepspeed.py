"""Real DeepSpeed engines, 4 processes = 2 replicas x 2 ranks, against the float64 oracle."""

import pytest
import torch

from tests.support import jobs
from tests.support.engine_configs import SHARDS, assert_same_states, ds_config
from tests.support.oracle import Setting
from tests.support.theory import RULES, assert_oracle, oracle_states

STEPS = 26


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", RULES)
def test_every_stage_trains_as_the_oracle(four, stage, name):
    s = RULES[name]
    assert_oracle(four().run(jobs.run, ds_config(s, stage), STEPS), oracle_states(s, STEPS))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_after_update_trains_as_the_oracle(four, stage):
    s = Setting(**vars(RULES["mt-dao-adam-n2"]) | {"after_update": True})
    assert_oracle(four().run(jobs.run, ds_config(s, stage), STEPS), oracle_states(s, STEPS))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_synchronous_warm_up_trains_as_the_oracle(four, stage):
    s = RULES["mt-dao-adam-n2"]
    results = four().run(jobs.run, ds_config(s, stage, deslo={"synchronous_steps": 12}), 26)
    assert_oracle(results, oracle_states(s, 26, synchronous_steps=12))
    assert all(result["bytes"] == result["planned"] for result in results)


def test_many_sub_groups_of_zero_3_train_as_the_oracle(four):
    s = RULES["mt-dao-adam-n2"]
    ds = ds_config(s, 3, zero_optimization={"stage": 3, "sub_group_size": 20})
    assert_oracle(four().run(jobs.run, ds, STEPS), oracle_states(s, STEPS))
    assert_oracle(four().run(jobs.run, ds, 20, (1, 6)), oracle_states(s, 20, broken=(1, 6)))


@pytest.mark.parametrize("outer", [(0.7, 0.9), (1.0, 0.9)], ids=["diloco", "outer lr 1"])
def test_outer_nesterov_trains_as_the_oracle(four, outer):
    s = Setting(**vars(RULES["des-loc-adam"]) | {"outer": outer})
    assert_oracle(four().run(jobs.run, ds_config(s, 2), STEPS), oracle_states(s, STEPS))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload_changes_no_bit(four, stage):
    s = RULES["mt-dao-adam-n2"]
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    resident = four().run(jobs.run, ds_config(s, stage), 14)
    offloaded = four().run(jobs.run, ds_config(s, stage, zero_optimization=offload), 14)
    assert_same_states(resident, offloaded, tolerance=1e-6)


def test_cpu_parameter_offload_trains_as_the_oracle(four):
    s = RULES["mt-dao-adam-n2"]
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert_oracle(four().run(jobs.run, ds_config(s, 3, zero_optimization=offload), 14), oracle_states(s, 14))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_overlap_changes_no_bit(four, stage):
    s = RULES["mt-dao-adam-n2"]
    on = four().run(jobs.run, ds_config(s, stage, deslo={"overlap_comm": True}), 14)
    off = four().run(jobs.run, ds_config(s, stage, deslo={"overlap_comm": False}), 14)
    assert_same_states(on, off, tolerance=0)


@pytest.mark.parametrize(
    ("stage", "accumulation"), [(0, "bf16"), (1, "bf16"), (1, "fp32"), (2, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_bf16_copies_are_the_masters_after_every_step(four, stage, accumulation):
    dtypes = {"grad_accum_dtype": accumulation}
    ds = ds_config(RULES["des-loc-adam"], stage, bf16={"enabled": True}, data_types=dtypes)
    for rank, steps in enumerate(four().run(jobs.low_precision_copies, ds, 8)):
        for step, tensors in enumerate(steps):
            for name, (master, copy) in tensors.items():
                assert torch.equal(master, copy), f"rank {rank}, step {step}, {name}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_are_shard_bytes_times_events(four, stage):
    results = four().run(jobs.run, ds_config(RULES["mt-dao-adam-n2"], stage), 25)
    matrices, biases = jobs.INPUTS * jobs.HIDDEN + jobs.HIDDEN * jobs.OUTPUTS, jobs.HIDDEN + jobs.OUTPUTS
    # with what is due of a group goes a word, counted as the first of its states
    shard = {"matrices": 4 * (matrices // SHARDS), "biases": 4 * -(-biases // SHARDS)}
    if stage == 3:  # ZeRO-3 pads each parameter to a multiple of the shards
        shard["biases"] = 4 * (jobs.HIDDEN // SHARDS + -(-jobs.OUTPUTS // SHARDS))
    for result in results:
        assert (
            result["bytes"]
            == result["planned"]
            == {
                "params": (shard["matrices"] + 4) * 8 + (shard["biases"] + 4) * 12,  # every 3 and every 2 of 24 steps
                "exp_avg": sum(shard.values()) * 4,
                "exp_avg_2": sum(shard.values()) * 6 + 4 * 4,  # four times without params of the matrices
                "exp_avg_sq": sum(shard.values()) * 2,
            }
        )
        assert result["events"] == {"params": 16, "exp_avg": 4, "exp_avg_2": 6, "exp_avg_sq": 2}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_crosses_replicas_between_averages(four, stage):
    s = Setting(**vars(RULES["des-loc-adam"]) | {"periods": {"x": 6, "u1": 6, "v": 6}})
    ds = ds_config(s, stage, deslo={"overlap_comm": False})
    ds["optimizer"]["params"]["sync_every"] = {"params": 6}
    for rank, calls in enumerate(four().run(jobs.traffic, ds, 14)):
        crossing = [
            (step, name, size) for step, name, ranks, size in calls if len({each // SHARDS for each in ranks}) > 1
        ]
        late = [(step, name) for step, name, size in crossing if step >= 2]  # ZeRO-3 compares its trace in steps 0-1
        averages = {2, 4, 6, 8, 10, 12}  # the biases' own period is 2
        assert {step for step, _ in late} == averages, (rank, late)
        assert {name for _, name in late} == {"all_reduce"}


def test_a_step_skipped_for_nan_on_one_replica_still_ticks_and_averages(four):
    s = RULES["des-loc-adam"]
    for stage in (1, 2, 3):
        results = four().run(jobs.run, ds_config(s, stage), 20, (1, 6))
        assert [result["skipped"] for result in results] == [0, 0, 1, 1]
        assert_oracle(results, oracle_states(s, 20, broken=(1, 6)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_overflow_on_one_replica_is_left_out_there_alone(four, stage):
    s = RULES["des-loc-adam"]
    results = four().run(jobs.run_fp16, ds_config(s, stage), 20, (1, 6))
    assert [result["skipped"] for result in results] == [0, 0, 1, 1]
    assert_oracle(results, oracle_states(s, 20, broken=(1, 6)), tolerance=2e-3)


def test_on_nonfinite_skip_leaves_out_the_step_where_deepspeed_looks_at_nothing(four):
    s = RULES["des-loc-adam"]
    results = four().run(jobs.run, ds_config(s, 0, deslo={"on_nonfinite": "skip"}), 20, (1, 6))
    assert [result["skipped"] for result in results] == [0, 0, 1, 1]
    assert_oracle(results, oracle_states(s, 20, broken=(1, 6)))


def test_lr_schedulers_stay_equal_when_one_replica_skips(four):
    schedule = {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 30, "warmup_type": "linear"},
    }
    results = four().run(jobs.run, ds_config(RULES["des-loc-adam"], 2, scheduler=schedule), 10, (0, 4))
    assert len({tuple(result["lr"]) for result in results}) == 1
    assert 0 < results[0]["lr"][0] < 0.01
