"""States in few bits on real engines and wrappers: near the oracle, equal on all replicas, planned bytes, resumes."""

from dataclasses import replace

import pytest
import torch

from tests.support import checkpoint_jobs, fragment_jobs
from tests.support.checkpoint_configs import same
from tests.support.engine_configs import ds_config
from tests.support.oracle import blocks
from tests.support.theory import RULES, oracle_states

STEPS = 12
S = replace(RULES["des-loc-adam"], periods={"x": 3, "u1": 3, "v": 6})
KINDS = ["plain", "ddp", "fsdp", "hsdp", "zero 0", "zero 1", "zero 2", "zero 3"]
WIRE = {"wire_dtype": {"params": "int4", "exp_avg": "int8", "exp_avg_sq": "float8"}}


def config_for(kind, s=S, **deslo):
    deslo = WIRE | deslo
    if kind.startswith("zero"):
        return ds_config(s, int(kind[-1]), deslo=deslo)
    return blocks(s, **({"replica_size": 2} if kind == "ddp" else {}), **deslo)


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_average_replicas_are_equal_near_the_oracle_and_sent_what_was_planned(four, kind):
    s = replace(S, after_update=True)
    results = four().run(fragment_jobs.run, kind, config_for(kind, s), STEPS)
    for result in results:
        same(result["states"], results[0]["states"])  # to the last bit
        assert result["bytes"] == result["planned"]
    (theirs,) = oracle_states(s, STEPS, replicas=4 if kind == "plain" else 2)[:1]
    for name, mine in results[0]["states"]["params"].items():
        assert torch.allclose(mine.double(), theirs["params"][name].double(), rtol=0, atol=3e-3), name


@pytest.mark.parametrize("kind", ["fsdp", "zero 0", "zero 3"])
def test_an_exact_resume_in_the_middle_of_a_period_changes_no_bit(four, tmp_path, kind):
    results = four().run(checkpoint_jobs.resumed, kind, config_for(kind), str(tmp_path / "c"), "per_replica", 7, 9)
    for result in results:
        same(result["straight"], result["loaded"])


@pytest.mark.parametrize("kind", ["ddp", "zero 2"])
@pytest.mark.parametrize("change", [{}, {"fragments": 2}, {"transport": "host"}], ids=str)
def test_overlap_changes_no_bit(four, kind, change):
    there, not_there = (
        four().run(fragment_jobs.run, kind, config_for(kind, overlap_comm=on, **change), STEPS) for on in (True, False)
    )
    for a, b in zip(there, not_there):
        same(a["states"], b["states"])
        assert a["bytes"] == a["planned"]


@pytest.mark.parametrize("kind", ["hsdp", "zero 1"])
def test_averages_may_take_several_steps(four, kind):
    s = replace(S, periods={"x": 4, "u1": 6, "v": 12}, delay=2)
    results = four().run(fragment_jobs.run, kind, config_for(kind, s, wire_dtype="int8"), STEPS + 2)
    theirs = oracle_states(s, STEPS + 2)
    for rank, result in enumerate(results):
        for name, mine in result["states"]["params"].items():
            assert torch.allclose(mine.double(), theirs[rank // 2]["params"][name].double(), rtol=0, atol=3e-3), name
        assert result["bytes"] == result["planned"]


STOCK = {"sync_every": {"params": 3, "exp_avg": 3, "exp_avg_sq": 6}}


@pytest.mark.parametrize("wire", [WIRE, {"wire_dtype": "int8", "wire_difference": ["params", "exp_avg"]}], ids=str)
def test_a_stock_optimizer_resumes_to_the_last_bit(four, tmp_path, wire):
    job = checkpoint_jobs.torch_jobs_adamw
    config = {"deslo": STOCK | wire}
    results = four().run(checkpoint_jobs.resumed, "plain", config, str(tmp_path / "c"), "per_replica", 7, 9, job)
    for result in results:
        same(result["straight"], result["loaded"])


@pytest.mark.parametrize("mode", ["averaged", "per_replica"])
@pytest.mark.parametrize("before, after", [("float32", "int4"), ("int4", "float32"), ("int8", "int4")])
def test_a_checkpoint_of_another_wire_loads(four, tmp_path, before, after, mode):
    """What it lacks begins anew, from what replicas have in common, or from their mean."""
    s, folder = replace(S, after_update=True), str(tmp_path / "c")
    four().run(checkpoint_jobs.saved, "fsdp", config_for("fsdp", s, wire_dtype=before), folder, mode, 8)
    results = four().run(checkpoint_jobs.loaded, "fsdp", config_for("fsdp", s, wire_dtype=after), folder)
    for result in results:
        assert result["steps"] == 8
        if mode == "averaged":
            same(result["states"], results[0]["states"])
