"""Muon on every framework that has whole matrices or can make them, 4 processes; refused elsewhere, on every rank."""

import pytest

from tests.support import checkpoint_jobs, jobs, torch_jobs
from tests.support.checkpoint_configs import same
from tests.support.muon_jobs import config, in_one_process
from tests.support.theory import assert_oracle

STEPS = 17


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp", "hsdp", "hsdp inside", "zero 0", "zero 1", "zero 2"])
def test_every_framework_steps_as_one_process_with_whole_matrices(four, kind):
    job = (jobs.run, config(kind)) if kind.startswith("zero") else (torch_jobs.run, kind, config(kind))
    results = four().run(*job, STEPS)
    theory = in_one_process(STEPS, 4 if kind == "plain" else 2)
    assert_oracle(results, theory, 2e-4)
    for result in results:
        assert result["bytes"] == result["planned"]


@pytest.mark.parametrize("kind", ["fsdp", "zero 2"])
def test_an_exact_resume_changes_no_bit(four, tmp_path, kind):
    job = (checkpoint_jobs.resumed, kind, config(kind), str(tmp_path / "c"), "per_replica", 4, 5)
    for result in four().run(*job):
        same(result["straight"], result["loaded"])


def test_an_average_saved_by_ddp_is_loaded_by_fsdp(four, tmp_path):
    folder = str(tmp_path / "c")
    four().run(checkpoint_jobs.saved, "ddp", config("ddp"), folder, "averaged", 6)
    assert all(error == "no error" for error in four().run(checkpoint_jobs.refused, "fsdp", config("fsdp"), folder))


def test_flat_partitions_that_cannot_be_made_whole_are_refused_on_every_rank(four):
    for error in four().run(jobs_raises, config("zero 3")):
        assert "rule muon: expected ZeRO stage 0, 1 or 2, got stage 3" in error


def jobs_raises(ds):
    from deslo_plugin import ConfigError

    try:
        jobs.run(ds, 1)
    except ConfigError as error:
        return str(error)
    return "no error"
