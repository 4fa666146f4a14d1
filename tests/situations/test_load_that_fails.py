"""A load, or a meeting of replicas, that one rank alone fails at: every rank hears of it."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoint_configs import config_for
from tests.support.checkpoint_jobs import Job
from tests.support.failing import failing, said_of, tree_of


def loads_that_fail(kind: str, config: dict, folder: str) -> dict[str, Any]:
    import deslo_plugin

    job, path = Job(kind, config), Path(folder) / "c"
    job.train(range(2))
    deslo_plugin.save(path, job.model)
    before = job.states()
    gone, said = OSError(errno.EIO, "Input/output error"), {}
    for harm, target in {
        "manifest": "deslo_plugin.checkpoint.save_load.read_manifest",
        "extra": "deslo_plugin.checkpoint.save_load.read_plain",
        "index": "deslo_plugin.checkpoint.save_load.read_index",
        "tree": tree_of(kind),
    }.items():
        with failing(2, target, gone):
            said[harm] = said_of(lambda: deslo_plugin.load(path, job.model))
    same = all(
        torch.equal(tensor, before[state][name])
        for state, tensors in job.states().items()
        for name, tensor in tensors.items()
    )
    with failing(2, "torch.distributed.checkpoint.filesystem.FileSystem.create_stream", gone):
        said["tensors"] = said_of(lambda: deslo_plugin.load(path, job.model))
    deslo_plugin.load(path, job.model)
    job.train(range(2, 4))
    job.close()
    return {"said": said, "same": same}


@pytest.mark.parametrize("kind", ["plain", "hsdp", "zero 2"])
def test_a_file_that_one_rank_cannot_read_is_an_error_on_every_rank(four, tmp_path, kind):
    for result in four().run(loads_that_fail, kind, config_for(kind, timeout_s=60), str(tmp_path)):
        assert result["same"]
        for harm, (name, number, text) in result["said"].items():
            assert (name, number) == ("OSError", errno.EIO), harm
            assert "rank 2 failed: Input/output error" in text, harm


def meets_that_fail(kind: str, config: dict) -> tuple:
    """One rank alone has no state to meet with."""
    import deslo_plugin

    job = Job(kind, config)
    job.train(range(2))
    with failing(2, tree_of(kind), RuntimeError("no such state")):
        said = said_of(lambda: deslo_plugin.sync_replicas(job.model))
    job.train(range(2, 4))
    job.close()
    return said


@pytest.mark.parametrize("kind", ["plain", "zero 2"])
def test_a_meeting_that_one_rank_cannot_come_to_is_an_error_on_every_rank(four, kind):
    for name, _, text in four().run(meets_that_fail, kind, config_for(kind, timeout_s=60)):
        assert name == "OSError" and "rank 2 failed: RuntimeError('no such state')" in text
