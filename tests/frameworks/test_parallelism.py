"""Parallelism inside a replica: each local shard averages with its peer, and the ranks of a replica stay one model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deslo_plugin
from tests.support import parallel_jobs as jobs
from tests.support import parallel_models as models
from tests.support.oracle import blocks
from tests.support.theory import RULES
from tests.support.worlds import Processes

S, STEPS = RULES["mt-dao-adam-n2"], 14


def assert_replicas(results: list[dict], theory: list[dict]) -> None:
    """Every rank holds what the oracle has of its replica, as far as it holds it, and sends what was planned."""
    for rank, result in enumerate(results):
        for state, tensors in result["states"].items():
            for name, own in tensors.items():
                error = (own.double() - theory[rank * len(theory) // len(results)][state][name]).abs().max()
                assert error <= 1e-5, f"rank {rank}, {state} of {name}: {error:.3g}"
        assert result["bytes"] == result["planned"]


KINDS = {  # what a replica's ranks share -> data-parallel ranks of a replica, the whole model
    "left out of fsdp": (2, models.net),
    "left out of hsdp": (2, models.net),
    "left out of hsdp inside": (2, models.net),
    "replicate x tp": (1, models.net),
    "pipeline": (1, models.net),
    "interleaved pipeline": (1, models.net),
    "expert parallel": (2, models.moe),
    "experts in a tensor": (2, models.stacked_moe),
    "experts beside one layer": (2, models.moe),
    "context parallel": (1, models.attention),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_that_shares_its_model_trains_as_the_oracle(four, kind):
    """Parameters that fully_shard has not got, norms whose gradients torch leaves as partial sums, stages, experts."""
    seats, whole = KINDS[kind]
    assert_replicas(four().run(jobs.run, kind, blocks(S), STEPS), models.theory(S, STEPS, seats, build=whole))


@pytest.mark.parametrize("kind", ["left out of hsdp", "replicate x tp", "pipeline", "expert parallel"])
def test_a_synchronous_warm_up_trains_as_the_oracle(four, kind):
    seats, build = KINDS[kind]
    results = four().run(jobs.run, kind, blocks(S, synchronous_steps=4), 10)
    for result in results:  # each of two backwards averages
        result["planned"]["gradients"] *= 2
    assert_replicas(results, models.theory(S, 10, seats, build, synchronous_steps=4))


@pytest.mark.parametrize("kind", ["left out of fsdp", "replicate x tp", "pipeline", "experts in a tensor"])
def test_the_norm_is_that_of_the_whole_replica(four, kind):
    seats, build = KINDS[kind]
    for rank, (*found, one, clipped) in enumerate(four().run(jobs.norms, kind, blocks(S))):
        model, replica = build().double(), rank // 2
        for seat in range(replica * seats, (replica + 1) * seats):
            inputs, targets = models.batch(seat, 0)
            (models.loss_of(model(inputs.double()), targets.double()) / seats).backward()
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], order) for order in (1, 2, torch.inf)
        ]
        assert found == pytest.approx([float(norm) for norm in norms], rel=1e-6)
        assert one == pytest.approx(found[1]) and clipped == pytest.approx(0.1, rel=1e-4)


def test_an_expert_that_no_token_reaches_gets_the_states_of_its_peer(four):
    results = four().run(jobs.idle_expert, 6)
    assert all(problems == [] for problems, _ in results)
    for rank in (0, 1):
        mine, theirs = results[rank][1], results[rank + 2][1]
        assert all(torch.equal(mine[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq"))


def test_a_tied_weight_of_two_stages_is_named_and_watched(four):
    """Where the script reduces its gradient nothing is said later; where it does not, the first average and check()
    do."""
    for reduces in (True, False):
        results = four().run(jobs.tied, reduces)
        lines = [line for said, _ in results for line in said]
        named = [line for line in lines if "table are trained on several ranks of a replica" in line]
        assert len(named) == reduces  # once in a world
        assert any("hold other values than the first rank" in line for line in lines) != reduces
        for _, found in results:
            assert len(found) == (not reduces) and all("hold other values than" in each for each in found), found


@pytest.mark.parametrize("kind", ["left out of hsdp", "replicate x tp", "pipeline", "expert parallel"])
def test_nothing_crosses_replicas_between_averages(four, tmp_path, kind):
    s = replace(S, periods=dict.fromkeys(S.periods, 3))
    assert four().run(jobs.one_replica_ahead, kind, blocks(s), 2, str(tmp_path)) == [4] * 4


def test_eight_ranks_in_several_dimensions_train_and_save_as_the_oracle(tmp_path):
    """2 replicas x 2 shards x 2 that split tensors, or stages; and stages x tensors in a mesh of five dimensions."""
    eight = Processes(8, tmp_path)
    try:
        theory = models.theory(S, STEPS, 2)
        for kind in ("fsdp x tp", "hsdp x tp", "fsdp x pp", "hsdp x pp"):
            assert_replicas(eight.run(jobs.run, kind, blocks(S), STEPS), theory)
        assert_replicas(eight.run(jobs.run, "five dimensions", blocks(S), STEPS), models.theory(S, STEPS, 1))
        for kind, seats in (("hsdp x tp", 2), ("fsdp x pp", 2), ("five dimensions", 1)):
            assert_saved(eight, tmp_path / kind, kind, seats, models.net)
    finally:
        eight.close()


@pytest.mark.parametrize("kind", ["pipeline", "expert parallel", "experts in a tensor", "replicate x tp"])
def test_checkpoints_and_exports_are_of_the_whole_model(four, tmp_path, kind):
    """All parts in one folder, which loads into plain replicas; resumed to the last bit from one for each replica."""
    assert_saved(four(), tmp_path, kind, *KINDS[kind])


def assert_saved(world: Processes, folder: Path, kind: str, seats: int, build: Callable) -> None:
    folder.mkdir(exist_ok=True)
    exact = world.run(jobs.saved, kind, blocks(S), str(folder / "exact"), "per_replica")
    assert all(result["same"] and result["steps"] == 9 for result in exact)
    world.run(jobs.saved, kind, blocks(S), str(folder / "mean"), "averaged")
    stored = deslo_plugin.load_averaged_state_dict(folder / "mean")
    replicas = [replica["params"] for replica in models.theory(S, 5, seats, build=build)]
    for name, tensor in build().state_dict().items():
        mean = sum(replica[name] for replica in replicas) / 2
        for found in [stored[name], *(result["whole"][name] for result in exact)]:
            assert found.shape == tensor.shape and (found.flatten().double() - mean).abs().max() <= 1e-5
        for result in exact:
            assert name not in result["here"] or (result["here"][name].double() - mean).abs().max() <= 1e-5
    assert all(result["whole"].keys() == build().state_dict().keys() for result in exact)
    (*_, loaded), *_ = world.run(jobs.loaded_plain, build, blocks(S), str(folder / "mean"))
    assert all((loaded[name].flatten() - stored[name].flatten()).abs().max() == 0 for name in stored)


def test_a_model_that_nothing_is_attached_to_has_no_norm_of_a_replica():
    with pytest.raises(deslo_plugin.ConfigError, match="a model of torch that attach was called with, got Sequential"):
        deslo_plugin.clip_grad_norm_(models.net(), 1.0)
