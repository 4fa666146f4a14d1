"""What a DeepSpeed user does around training: other ways in, resuming, exporting, other engines."""

import pytest
import torch

from tests.support import engine_use_jobs, jobs
from tests.support.engine_configs import assert_same_states, ds_config
from tests.support.theory import RULES, assert_oracle, oracle_states

N2 = RULES["mt-dao-adam-n2"]


@pytest.mark.parametrize("how", ["object", "callable"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_optimizer_made_by_the_script_is_the_json_entry(four, stage, how):
    ds = ds_config(N2, stage)
    block = {"optimizer": ds.pop("optimizer"), "deslo": ds.pop("deslo")}
    assert_oracle(four().run(engine_use_jobs.given_optimizer, how, ds, block, 20), oracle_states(N2, 20))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("before", [5, 6])
def test_resume_in_the_middle_of_a_period_changes_no_bit(four, tmp_path, stage, before):
    ds = ds_config(N2, stage, deslo={"checkpoint_mode": "per_replica"})
    for straight, again in four().run(engine_use_jobs.resumed, ds, str(tmp_path), before, 9):
        assert_same_states([straight], [again], tolerance=0)


def test_resume_in_bf16_changes_no_bit(four, tmp_path):
    for stage in (0, 2):
        ds = ds_config(N2, stage, deslo={"checkpoint_mode": "per_replica"}, bf16={"enabled": True})
        for straight, again in four().run(engine_use_jobs.resumed, ds, str(tmp_path / str(stage)), 5, 6):
            assert_same_states([straight], [again], tolerance=0)


def test_what_is_not_there_is_not_loaded_and_deepspeeds_own_tools_find_no_replica(four, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    assert four().run(engine_use_jobs.load_only, ds_config(N2, 2), str(tmp_path)) == ["(None, None)"] * 4
    four().run(engine_use_jobs.resumed, ds_config(N2, 2, deslo={"checkpoint_mode": "per_replica"}), str(tmp_path), 2, 1)
    with pytest.raises(Exception, match="global_step2"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)


def test_resume_on_another_number_of_replicas_is_refused(four, tmp_path):
    four().run(engine_use_jobs.resumed, ds_config(N2, 2, deslo={"checkpoint_mode": "per_replica"}), str(tmp_path), 2, 1)
    for message in four().run(engine_use_jobs.load_only, ds_config(N2, 2, deslo={"replica_size": 4}), str(tmp_path)):
        assert "expected the 2 replica(s) of 2 rank(s) that saved it, got 1 of 4" in message


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_16_bit_export_is_the_mean_and_a_plain_state_dict_is_refused(four, tmp_path, stage):
    for mean, refusal in four().run(engine_use_jobs.sixteen_bit_export, ds_config(N2, stage), str(tmp_path)):
        saved = torch.load(tmp_path / "pytorch_model.bin")
        assert saved.keys() == mean.keys() and all(torch.equal(saved[name], mean[name]) for name in mean)
        assert "one of 2 replicas, which differ between averages" in refusal and "averaged_state_dict(model)" in refusal


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_exported_model_is_the_mean_of_the_replicas(four, stage, bf16):
    ds = ds_config(N2, stage, bf16={"enabled": bf16})
    results = four().run(engine_use_jobs.averaged_model, ds, 4)
    replicas = [results[0][0], results[2][0]]
    assert any(not torch.equal(replicas[0][name], replicas[1][name]) for name in replicas[0])
    for _, exported in results:
        for name, first in replicas[0].items():
            mean = (first.double() + replicas[1][name].double()) / 2
            assert (exported[name].view(-1) - mean).abs().max() < 1e-7


def test_zero_init_shards_over_one_replica(four):
    ds = ds_config(N2, 3)
    assert_oracle(four().run(engine_use_jobs.sharded_from_birth, ds, 20), oracle_states(N2, 20))


def test_zero_init_over_the_world_is_refused(four):
    for message in four().run(engine_use_jobs.sharded_from_birth, ds_config(N2, 3), 1, False):
        assert "pass config_dict_or_path" in message


@pytest.mark.parametrize("stage", [0, 2])
def test_a_plain_engine_in_the_same_process_keeps_the_world(four, stage):
    results = four().run(engine_use_jobs.beside_a_plain_engine, ds_config(N2, stage), 20)
    assert_oracle([states for states, _ in results], oracle_states(N2, 20))
    assert all(ranks == [0, 1, 2, 3] for _, ranks in results)


def test_every_rank_of_every_replica_reads_its_own_data(four):
    seen = four().run(engine_use_jobs.data_seen, ds_config(N2, 2))
    assert sorted(sample for samples in seen for sample in samples) == list(range(32))


def test_uninitialised_padding_of_zero_3_does_not_look_like_divergence(four):
    for flat, counted, broken in four().run(engine_use_jobs.padding_of_zero_3, ds_config(N2, 3)):
        assert flat * 2 > counted and broken == 0


def test_periods_change_no_bit_of_one_replica(four):
    ds = ds_config(N2, 2, deslo={"replica_size": 4})
    often = four().run(jobs.run, ds, 12)
    ds["optimizer"]["params"] |= {"sync_every": {"params": 1000}}
    assert_same_states(often, four().run(jobs.run, ds, 12), tolerance=0)


def test_published_reduction_of_170_times(four):
    ds = ds_config(N2, 2)
    ds["optimizer"]["params"] = {"betas": [0.9, 0.95], "sync_every": {"params": 256}}
    vectors = four().run(jobs.run, ds, 1)[0]["vectors_per_step"]
    assert vectors == pytest.approx(1 / 256 + (1 / 768 + 1 / 1536) * 1.0 + _biases_own_period(), rel=1e-9)


def _biases_own_period() -> float:
    biases, matrices = 2 * -(-(jobs.HIDDEN + jobs.OUTPUTS) // 2), jobs.INPUTS * jobs.HIDDEN + jobs.HIDDEN * jobs.OUTPUTS
    return (1 / 2 - 1 / 256) * biases / (biases + matrices)
