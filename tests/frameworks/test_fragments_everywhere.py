"""States in fragments on real engines and wrappers: the oracle, the bytes of the plan, overlap and resumes."""

from dataclasses import replace

import pytest

from tests.support import checkpoint_jobs, fragment_jobs
from tests.support.checkpoint_configs import same
from tests.support.engine_configs import ds_config
from tests.support.oracle import blocks
from tests.support.theory import RULES, assert_oracle, oracle_states

STEPS = 16
S = replace(RULES["des-loc-adam"], periods={"x": 3, "u1": 6, "v": 12})
KINDS = ["plain", "ddp", "fsdp", "hsdp", "zero 0", "zero 1", "zero 2", "zero 3"]


def config_for(kind, s=S, fragments=3, **deslo):
    deslo |= {"fragments": fragments}
    if kind.startswith("zero"):
        return ds_config(s, int(kind[-1]), deslo=deslo)
    return blocks(s, **({"replica_size": 2} if kind == "ddp" else {}), **deslo)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_oracles_and_bytes_are_the_plans(four, kind):
    """Fragments are cut out of flat partitions and shards as they lie on each rank; no rank sends more at a step than
    the plan's peak."""
    results = four().run(fragment_jobs.run, kind, config_for(kind), STEPS)
    places = results[0]["places"]
    assert {int(index) for each in places.values() for index in each} == {0, 1, 2}
    for result in results:
        same({"places": result["places"]}, {"places": places})
        assert result["bytes"] == result["planned"]
        assert max(result["at each step"].values()) <= result["peak"] + 16 * 4  # words beside averages
    assert_oracle(results, oracle_states(S, STEPS, replicas=4 if kind == "plain" else 2, places=places))


@pytest.mark.parametrize("kind", ["hsdp", "zero 3"])
@pytest.mark.parametrize("change", [{"delay": 2}, {"after_update": True}], ids=str)
def test_in_other_orders_too(four, kind, change):
    s = replace(S, periods={"x": 4, "u1": 6, "v": 12}, **change)
    results = four().run(fragment_jobs.run, kind, config_for(kind, s), STEPS)
    assert_oracle(results, oracle_states(s, STEPS, places=results[0]["places"]))


@pytest.mark.parametrize("kind", ["ddp", "zero 2"])
def test_overlap_changes_no_bit(four, kind):
    there, not_there = (
        four().run(fragment_jobs.run, kind, config_for(kind, overlap_comm=on), STEPS) for on in (True, False)
    )
    for a, b in zip(there, not_there):
        same(a["states"], b["states"])


@pytest.mark.parametrize("kind", ["fsdp", "zero 3"])
def test_an_exact_resume_in_the_middle_of_a_period_changes_no_bit(four, tmp_path, kind):
    results = four().run(checkpoint_jobs.resumed, kind, config_for(kind), str(tmp_path / "c"), "per_replica", 7, 9)
    for result in results:
        same(result["straight"], result["loaded"])
        assert result["losses"]
