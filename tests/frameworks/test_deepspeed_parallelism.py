"""Parallelism of DeepSpeed inside a replica, against the float64 oracle: each replica is one model in one process."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import deslo_plugin
from tests.support import engine_parallel_jobs as jobs
from tests.support import jobs as engine_jobs
from tests.support import parallel_models as models
from tests.support.engine_configs import ds_config
from tests.support.theory import RULES, assert_oracle, oracle_states
from tests.support.worlds import Processes

S, STEPS = RULES["mt-dao-adam-n2"], 14
HPZ = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}


def assert_replicas(results: list[dict], theory: list[dict], part: Callable = lambda name, value, rank: value) -> None:
    """Every rank holds what the oracle has of its replica, or its part of that, and sends what was planned."""
    for rank, result in enumerate(results):
        for state, tensors in theory[rank * len(theory) // len(results)].items():
            for name, expected in tensors.items():
                error = (result["states"][state][name].double() - part(name, expected, rank)).abs().max()
                assert error <= 1e-5, f"rank {rank}, {state} of {name}: {error:.3g}"
        assert result["bytes"] == result["planned"]


@pytest.mark.parametrize(("how", "stage"), [("mesh", 0), ("mesh", 2), ("json", 3), ("mpu", 1), ("mpu", 3)])
def test_ulysses_inside_a_replica_trains_as_the_oracle(four, how, stage):
    """Two ranks share each sequence; DeepSpeed is told by mesh_param, by the JSON, or by the mpu of its HF class."""
    results = four().run(jobs.run_ulysses, S, stage, how, STEPS)
    assert_replicas(results, models.theory(S, STEPS, 1, build=jobs.heads))


def test_ulysses_of_a_llama_trains_as_the_oracle(four):
    """As DeepSpeed registers it with transformers."""
    from tests.support.tiny_llama import llama

    results = four().run(jobs.run_ulysses, S, 2, "transformers", STEPS)
    assert_replicas(results, models.theory(S, STEPS, 1, build=llama))


def test_what_shares_sequences_is_saved_and_exported_as_any_other(four, tmp_path):
    results = four().run(jobs.saved, jobs.ulysses, (S, 2, "mesh", 2), str(tmp_path / "exact"), "per_replica")
    first, second = (replica["params"] for replica in models.theory(S, 5, 1, build=jobs.heads))
    for result in results:
        assert result["same"] and result["steps"] == 9
        for name, expected in first.items():
            mean = (expected + second[name]) / 2
            assert (result["whole"][name].flatten().double() - mean).abs().max() <= 1e-5
            assert (result["here"][name].double() - mean).abs().max() <= 1e-5


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_of_ulysses_crosses_replicas_between_averages(four, tmp_path, stage):
    s = replace(S, periods=dict.fromkeys(S.periods, 4))
    arguments = jobs.ulysses, (s, stage, "mesh", 2), 1, str(tmp_path)
    assert four().run(jobs.one_replica_ahead, *arguments) == [5] * 4


@pytest.mark.parametrize(("stage", "recorded"), [(0, False), (1, False), (2, True), (3, False)])
def test_autotp_inside_a_replica_trains_as_the_oracle(four, stage, recorded):
    """Two ranks share the matrices of two layers, by the JSON or by tp_model_init."""
    results = four().run(jobs.run_autotp, S, stage, STEPS, 2, recorded)
    assert_replicas(results, models.theory(S, STEPS, 1), jobs.own_part)


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_of_autotp_crosses_replicas_between_averages(four, tmp_path, stage):
    s = replace(S, periods=dict.fromkeys(S.periods, 4))
    arguments = jobs.autotp, (s, stage, 2), 1, str(tmp_path)
    assert four().run(jobs.one_replica_ahead, *arguments) == [5] * 4


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_autotp_cuts_is_saved_and_exported_whole(four, tmp_path, stage):
    """All parts in one folder, which loads where nothing is cut; resumed to the last bit from one for each replica."""
    exact = four().run(jobs.saved, jobs.autotp, (S, stage, 2), str(tmp_path / "exact"), "per_replica")
    assert all(result["same"] and result["steps"] == 9 for result in exact)
    four().run(jobs.saved, jobs.autotp, (S, stage, 2), str(tmp_path / "mean"), "averaged")
    stored = deslo_plugin.load_averaged_state_dict(tmp_path / "mean")
    loaded = four().run(jobs.loaded_whole, S, 3 - stage, str(tmp_path / "mean"))
    replicas = [replica["params"] for replica in models.theory(S, 5, 1)]
    for name, tensor in models.net().state_dict().items():
        mean = sum(replica[name] for replica in replicas) / 2
        for found in [stored[name], *(result["whole"][name] for result in exact)]:
            assert found.shape == tensor.shape and (found.flatten().double() - mean).abs().max() <= 1e-5
        for rank, result in enumerate(exact):
            assert (result["here"][name].double() - jobs.own_part(name, mean, rank)).abs().max() <= 1e-5
            assert torch.equal(loaded[rank][name], stored[name].flatten())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_llama_that_autotp_cuts_by_its_own_plan_averages_as_the_oracle(four, tmp_path, stage):
    from tests.support.tiny_llama import llama

    results = four().run(jobs.cut_llama, S, stage, 5, str(tmp_path / "mean"))
    stored = deslo_plugin.load_averaged_state_dict(tmp_path / "mean")
    first, second = (replica["params"] for replica in models.theory(S, 5, 1, build=llama))
    assert all(result["cut"] == 2 * 7 + 1 for result in results)  # all matrices of two layers, and the head
    for name, expected in first.items():
        mean = (expected + second[name]) / 2
        for found in [stored[name], *(result["whole"][name] for result in results)]:
            assert (found.flatten().double() - mean).abs().max() <= 1e-5, name


@pytest.mark.parametrize("broken", [None, (1, 6)])
def test_hpz_inside_a_replica_trains_as_the_oracle(four, broken):
    """A second partition on two ranks; forwards use what averages have made of the first, after a skipped step too."""
    ds = ds_config(S, 3, zero_optimization=HPZ)
    assert_oracle(four().run(engine_jobs.run, ds, 20, broken), oracle_states(S, 20, broken=broken))


def test_replicas_of_four_ranks_that_share_by_two_train_as_the_oracle(tmp_path):
    """8 ranks: 2 replicas of 2 x 2."""
    eight = Processes(8, tmp_path)
    try:
        for stage in (0, 2, 3):
            cut = eight.run(jobs.run_autotp, S, stage, STEPS, 4)
            assert_replicas(cut, models.theory(S, STEPS, 2), jobs.own_part)
        for how, stage in (("mesh", 0), ("mpu", 2), ("json", 3)):
            shared = eight.run(jobs.run_ulysses, S, stage, how, STEPS, 4)
            assert_replicas(shared, models.theory(S, STEPS, 2, build=jobs.heads))
        ds = ds_config(S, 3, zero_optimization=HPZ, deslo={"replica_size": 4})
        assert_oracle(eight.run(engine_jobs.run, ds, STEPS), oracle_states(S, STEPS, ranks=8))
    finally:
        eight.close()
