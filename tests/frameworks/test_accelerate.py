"""Accelerate in 4 processes: our one line on either side of ``prepare``, over DDP, FSDP2 and DeepSpeed."""

import pytest
import torch

from tests.support import accelerate_jobs as jobs
from tests.support.engine_configs import ds_config
from tests.support.oracle import blocks
from tests.support.theory import RULES, assert_oracle, oracle_states

S = RULES["des-loc-adam"]
SYNC_EVERY = {"params": 3, "exp_avg": 6, "exp_avg_sq": 12}
STOCK = {"deslo": {"replica_size": 2, "sync_every": SYNC_EVERY}}


def theory(steps, own_period=True):
    return [{"params": replica["params"]} for replica in oracle_states(S, steps, own_period=own_period)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_desloc_trains_as_the_oracle(four, kind, side):
    assert_oracle(four().run(jobs.run, kind, side, "DesLoc", blocks(S, replica_size=2), 14), theory(14))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_scripts_own_adamw_trains_as_the_oracle(four, kind):
    assert_oracle(four().run(jobs.run, kind, "before", "AdamW", STOCK, 14), theory(14, own_period=False))


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_json_trains_as_the_oracle(four, side, stage):
    ds = ds_config(S, stage, train_micro_batch_size_per_gpu=2, steps_per_print=10**9)
    results = four().run(jobs.run, "deepspeed", side, "DummyOptim", None, 14, ds)
    assert_oracle(results, theory(14))
    assert results[0]["replicas"] == 2


def test_auto_values_are_filled_from_the_dummy_optimizer(four):
    ds = ds_config(S, 2, train_micro_batch_size_per_gpu=2, steps_per_print=10**9)
    ds["optimizer"]["params"]["lr"] = "auto"
    assert_oracle(four().run(jobs.run, "deepspeed", "before", "DummyOptim", None, 14, ds), theory(14))


def test_our_blocks_can_be_given_beside_a_deepspeed_json(four):
    ds = ds_config(S, 2, train_micro_batch_size_per_gpu=2, steps_per_print=10**9)
    own = {key: ds.pop(key) for key in ("optimizer", "deslo")}
    assert_oracle(four().run(jobs.run, "deepspeed", "before", "DummyOptim", own, 14, ds), theory(14))


def saving(optimizer, mode):
    config = blocks(S, replica_size=2) if optimizer == "DesLoc" else STOCK
    return config | {"deslo": config["deslo"] | {"checkpoint_mode": mode}}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["DesLoc", "AdamW"])
def test_training_repeats_from_an_exact_save_state(four, tmp_path, kind, optimizer):
    for result in four().run(jobs.resumed, kind, optimizer, saving(optimizer, "per_replica"), str(tmp_path)):
        for name, saved in result["saved"].items():
            assert torch.equal(saved, result["back"][name]) and torch.equal(result["once"][name], result["again"][name])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_save_state_saves_the_average(four, tmp_path, kind):
    results = four().run(jobs.resumed, kind, "DesLoc", saving("DesLoc", "averaged"), str(tmp_path))
    assert any(not torch.equal(results[0]["saved"][name], results[2]["saved"][name]) for name in results[0]["saved"])
    for result in results:
        for name, back in result["back"].items():
            mean = (results[0]["saved"][name].double() + results[2]["saved"][name].double()) / 2
            assert (back - mean).abs().max() < 1e-7


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "deepspeed"])
def test_get_state_dict_gives_the_average_or_refuses(four, kind):
    """Under DDP one rank alone may ask: an average would wait for the others there."""
    ds = ds_config(S, 2, train_micro_batch_size_per_gpu=2, steps_per_print=10**9) if kind == "deepspeed" else None
    config, optimizer = (None, "DummyOptim") if ds else (saving("DesLoc", "averaged"), "DesLoc")
    for given, mean, own in four().run(jobs.state_dict_of, kind, optimizer, config, ds):
        if kind == "ddp":
            assert "one of 2 replicas" in given and "deslo_plugin.sync_replicas(model) before this" in given
        else:
            assert given.keys() == mean.keys() and all(torch.equal(given[name], mean[name]) for name in mean)
        assert all(tensor.isfinite().all() for tensor in own.values())


@pytest.mark.parametrize("how", ["asked for", "by default"])
def test_batches_that_one_rank_reads_for_all_are_refused(four, how):
    for error in four().run(jobs.dispatching, how):
        assert "dispatch_batches" in error and "DataLoaderConfiguration(dispatch_batches=False)" in error
