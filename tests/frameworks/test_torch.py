"""Plain torch, DDP and FSDP2, 4 processes, against the float64 oracle."""

import pytest
import torch

from tests.support import torch_jobs as jobs
from tests.support import torch_use_jobs
from tests.support.oracle import Setting, blocks
from tests.support.theory import ACCUMULATION, RULES, assert_oracle, oracle_states
from tests.support.worlds import Processes

STEPS = 26
WORLDS = {  # wrap -> replicas, replica_size as written
    "plain": (4, "auto"),
    "ddp": (2, 2),
    "fsdp": (2, "auto"),
    "hsdp": (2, "auto"),
    "hsdp inside": (2, "auto"),
}


def blocks_for(s: Setting, wrap: str, **deslo) -> dict:
    return blocks(s, replica_size=WORLDS[wrap][1], **deslo)


@pytest.mark.parametrize("wrap", WORLDS)
@pytest.mark.parametrize("name", RULES)
def test_every_framework_trains_as_the_oracle(four, wrap, name):
    s = RULES[name]
    results = four().run(jobs.run, wrap, blocks_for(s, wrap), STEPS)
    assert_oracle(results, oracle_states(s, STEPS, replicas=WORLDS[wrap][0]))
    assert all(result["bytes"] == result["planned"] for result in results)


@pytest.mark.parametrize("wrap", WORLDS)
def test_a_synchronous_warm_up_trains_as_the_oracle(four, wrap):
    s = RULES["mt-dao-adam-n2"]
    results = four().run(jobs.run, wrap, blocks_for(s, wrap, synchronous_steps=12), 30)
    assert_oracle(results, oracle_states(s, 30, replicas=WORLDS[wrap][0], synchronous_steps=12))
    for result in results:
        if wrap == "plain":  # nobody says which backward is the last one: each of them averages
            result["planned"]["gradients"] *= ACCUMULATION
        assert result["bytes"] == result["planned"]


@pytest.mark.parametrize("wrap", WORLDS)
def test_after_update_trains_as_the_oracle(four, wrap):
    s = Setting(**vars(RULES["mt-dao-adam-n2"]) | {"after_update": True})
    results = four().run(jobs.run, wrap, blocks_for(s, wrap), 24)
    assert_oracle(results, oracle_states(s, 24, replicas=WORLDS[wrap][0]))


@pytest.mark.parametrize("wrap", WORLDS)
def test_overlap_changes_no_bit(four, wrap):
    s = RULES["mt-dao-adam-n2"]
    there, not_there = (four().run(jobs.run, wrap, blocks_for(s, wrap, overlap_comm=on), 14) for on in (True, False))
    for a, b in zip(there, not_there):
        assert all(torch.equal(a["states"][k][n], b["states"][k][n]) for k in a["states"] for n in a["states"][k])


@pytest.mark.parametrize(
    "wrap, options",
    [
        ("plain", {}),
        ("ddp", {}),
        ("ddp", {"find_unused_parameters": True}),
        ("ddp", {"static_graph": True}),
        ("fsdp", {}),
        ("hsdp", {}),
    ],
    ids=str,
)
def test_nothing_crosses_replicas_between_averages(four, tmp_path, wrap, options):
    s = Setting(**vars(RULES["des-loc-adam"]) | {"periods": {"x": 3, "u1": 3, "v": 3}})
    config = blocks(s, **({"replica_size": 1} if wrap == "ddp" else {}))
    losses = four().run(jobs.one_replica_ahead, wrap, config, 2, str(tmp_path), options)
    assert all(len(each) == 8 for each in losses)


def test_eight_ranks_in_three_dimensions_train_as_the_oracle(tmp_path):
    """2 sites that average x 2 nodes that replicate x 2 shards, and DDP of 2 replicas of 4."""
    s = RULES["mt-dao-adam-n2"]
    eight = Processes(8, tmp_path)
    try:
        theory = oracle_states(s, 14, ranks=8)
        assert_oracle(eight.run(jobs.run, "hsdp inside", blocks(s), 14, None, None, {"shape": (2, 2, 2)}), theory)
        assert_oracle(eight.run(jobs.run, "ddp", blocks(s, replica_size=4), 14), theory)
    finally:
        eight.close()


@pytest.mark.parametrize("wrap", ["plain", "ddp", "hsdp"])
def test_a_parameter_that_one_replica_does_not_use_is_averaged_in_the_warm_up_too(four, wrap):
    """Replica 0 never uses the last layer: its gradient counts as zero, the last layer stays equal everywhere."""
    results = four().run(
        torch_use_jobs.unused,
        wrap,
        {
            "optimizer": {"params": {"lr": 1e-2}},
            "deslo": {"synchronous_steps": 9} | ({"replica_size": 1} if wrap == "ddp" else {}),
        },
    )
    for moved, params in results:
        assert moved and all(torch.equal(p, q) for p, q in zip(params, results[0][1]))
