"""The switch on every framework, 4 processes: the float64 oracle, and resumes before, at and after it to the bit."""

from dataclasses import replace

import pytest
import torch

from tests.support import accelerate_jobs, checkpoint_jobs, jobs, torch_jobs
from tests.support.checkpoint_configs import same
from tests.support.engine_configs import ds_config
from tests.support.oracle import Switch, blocks
from tests.support.theory import RULES, assert_oracle, oracle_states

WARM_UP, STEPS = 9, 22
TWO = replace(RULES["mt-dao-adam-n2"], weights=[1.0, 0.0])
S = replace(TWO, switch=Switch(WARM_UP, [0.9, 0.99], [0.05, 0.95], 2.0, (1, 2)))
LATER = replace(TWO, switch=Switch(12, [0.5, 0.95], [0.1, 0.7], 0.5, (2,)))  # where averages of both are due
WARM = {"synchronous_steps": WARM_UP}


def config_for(kind, s):
    if kind.startswith("zero"):
        return ds_config(s, int(kind[-1]), deslo=WARM)
    return blocks(s, **({"replica_size": 2} if kind == "ddp" else {}), **WARM)


@pytest.mark.parametrize("s", [S, LATER], ids=["at the end of the warm-up", "later"])
@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp", "zero 0", "zero 1", "zero 2", "zero 3"])
def test_every_framework_switches_as_the_oracle(four, kind, s):
    config = config_for(kind, s)
    job = (jobs.run, config) if kind.startswith("zero") else (torch_jobs.run, kind, config)
    theory = oracle_states(s, STEPS, replicas=4 if kind == "plain" else 2, synchronous_steps=WARM_UP)
    assert_oracle(four().run(*job, STEPS), theory)


def test_accelerate_switches_as_the_oracle(four):
    results = four().run(accelerate_jobs.run, "ddp", "before", "DesLoc", config_for("ddp", S), STEPS)
    theory = oracle_states(S, STEPS, synchronous_steps=WARM_UP)
    assert_oracle(results, [{"params": replica["params"]} for replica in theory])


@pytest.mark.parametrize("before", [WARM_UP - 1, WARM_UP, WARM_UP + 1])
@pytest.mark.parametrize("kind", ["fsdp", "zero 2"])
def test_an_exact_resume_before_at_and_after_the_switch_changes_no_bit(four, tmp_path, kind, before):
    job = (checkpoint_jobs.resumed, kind, config_for(kind, S), str(tmp_path / "c"), "per_replica", before, 5)
    for result in four().run(*job):
        same(result["straight"], result["loaded"])


def test_an_average_saved_before_or_at_the_switch_resumes_to_the_bit(four, tmp_path):
    """Replicas are equal there, and so is their mean. (A new DDP cuts its first gradients into other buckets.)"""
    for kind, before in (("plain", WARM_UP - 1), ("fsdp", WARM_UP)):
        folder = str(tmp_path / kind)
        for result in four().run(checkpoint_jobs.resumed, kind, config_for(kind, S), folder, "averaged", before, 5):
            same(result["straight"], result["loaded"])


def test_a_flight_over_the_switch_resumes_to_the_bit(four, tmp_path):
    config = blocks(replace(LATER, delay=2), **WARM)
    job = (checkpoint_jobs.resumed, "plain", config, str(tmp_path / "c"), "per_replica", 12, 6)
    for result in four().run(*job):
        same(result["straight"], result["loaded"])


def test_a_checkpoint_of_another_switch_is_refused_on_every_rank(four, tmp_path):
    folder, made = str(tmp_path / "c"), "the switch that these states have made, after step 9 betas 0.9, 0.99"
    four().run(checkpoint_jobs.saved, "ddp", config_for("ddp", S), folder, "averaged", WARM_UP + 1)
    for kind, s, expected in (
        ("fsdp", TWO, made),
        ("zero 2", replace(S, switch=replace(S.switch, lr_factor=1.0)), made),
    ):
        for error in four().run(checkpoint_jobs.refused, kind, config_for(kind, s), folder):
            assert expected in error and "write it as it was" in error


def test_the_synchronous_part_is_that_of_a_run_without_the_switch(four):
    for kind in ("fsdp", "zero 2"):
        ours, without = (four().run(checkpoint_jobs.unsaved, kind, config_for(kind, s), WARM_UP) for s in (S, TWO))
        for mine, other in zip(ours, without):
            assert all(torch.equal(mine[state][name], other[state][name]) for state in mine for name in mine[state])
