"""Checkpoints at a URL: saved, replaced, cut off and loaded where nothing is renamed and no folder is shared."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deslo_plugin
from deslo_plugin.checkpoint.folder import CURRENT
from deslo_plugin.errors import ConfigError
from tests.support import bucket
from tests.support import checkpoint_jobs as jobs
from tests.support.checkpoint_configs import config_for, same
from tests.support.command_line import run
from tests.support.failing import failing, said_of

pytestmark = pytest.mark.filterwarnings("ignore:UPath 'bucket'")


@pytest.fixture(autouse=True)
def _known():
    bucket.known()


def url_of(folder: Path) -> str:
    return f"bucket:/{folder}"


def resumed(*args: Any) -> dict[str, Any]:
    bucket.known()
    return jobs.resumed(*args)


@pytest.mark.parametrize("kind, mode", [("hsdp", "per_replica"), ("zero 2", "averaged")])
def test_a_job_resumes_from_a_store_as_from_a_disk(four, tmp_path, kind, mode):
    results = four().run(resumed, kind, config_for(kind), url_of(tmp_path / "c"), mode, 3, 3)
    if mode == "per_replica":
        for result in results:
            same(result["straight"], result["loaded"])
            assert result["losses"] and result["random"] and result["extra"]["batch"] == 3
    else:
        alone = four().run(resumed, kind, config_for(kind), str(tmp_path / "disk"), mode, 3, 3)
        for result, disk in zip(results, alone):
            same(result["loaded"], disk["loaded"])


def replaced(config: dict[str, Any], url: str) -> dict[str, Any]:
    """One checkpoint after the other at one place; some fail on rank 2, and one job is cut off before it is whole."""
    bucket.known()
    job = jobs.Job("plain", config)
    said = {}
    job.train(range(2))
    deslo_plugin.save(url, job.model, mode="per_replica", extra={"n": 1})
    job.train(range(2, 4))
    full = OSError(errno.ENOSPC, "No space left on device")
    with failing(2, "deslo_plugin.checkpoint.content.write_plain", full):
        said["files"] = said_of(lambda: deslo_plugin.save(url, job.model, mode="per_replica", extra={"n": 2}))
    with failing(0, "deslo_plugin.checkpoint.folder.write_whole", full):
        said["the last word"] = said_of(lambda: deslo_plugin.save(url, job.model, mode="per_replica", extra={"n": 3}))
    said["loads"] = deslo_plugin.load(url, job.model)["n"]
    pending = deslo_plugin.save(url, job.model, mode="averaged", extra={"n": 4}, wait=False)
    pending.wait()
    said["loads then"] = deslo_plugin.load(url, job.model)["n"]
    said["mean"] = deslo_plugin.averaged_state_dict(job.model)
    dist.barrier()
    job.close()
    return said


def test_the_checkpoint_before_stays_until_the_new_one_is_whole(four, tmp_path):
    results = four().run(replaced, config_for("plain"), url_of(tmp_path / "last"))
    for said in results:
        assert {said[name][1] for name in ("files", "the last word")} == {errno.ENOSPC}
        assert said["loads"] == 1 and said["loads then"] == 4
    held = sorted(path.name for path in (tmp_path / "last").iterdir() if any(path.rglob("*")) or path.is_file())
    assert len(held) == 2 and held[0] == CURRENT, "nothing is left of the others"
    weights = deslo_plugin.load_averaged_state_dict(url_of(tmp_path / "last"))
    for name, value in results[0]["mean"].items():
        assert torch.equal(weights[name], value)


def test_what_lies_in_a_store_is_found_inspected_and_copied(four, tmp_path):
    four().run(jobs_saved, config_for("plain"), url_of(tmp_path))
    latest = deslo_plugin.latest_checkpoint(url_of(tmp_path))
    assert latest.name == "4"
    shown = run("ckpt", "inspect", url_of(tmp_path)).output
    assert "after 4 steps" in shown and "whole: " in shown
    shutil.copytree(tmp_path / "4", tmp_path / "disk" / "4")  # as aws s3 cp --recursive does
    there, here = (deslo_plugin.load_averaged_state_dict(path) for path in (latest, tmp_path / "disk" / "4"))
    same({"all": there}, {"all": here})
    save = next(path for path in (tmp_path / "4").iterdir() if path.is_dir())
    (save / "first_rank.pt").write_bytes(b"other")
    torn = run("ckpt", "inspect", url_of(tmp_path / "4"), status=1).output
    assert "first_rank.pt: other bytes" in torn
    with pytest.raises(ConfigError, match="first_rank.pt: other bytes than were saved"):
        deslo_plugin.load_averaged_state_dict(latest)
    (tmp_path / "4" / CURRENT).write_text("../../elsewhere")
    with pytest.raises(ConfigError, match="the name of a save beside it"):
        deslo_plugin.load_averaged_state_dict(latest)


def jobs_saved(config: dict[str, Any], url: str) -> None:
    bucket.known()
    job = jobs.Job("plain", config)
    for steps in (2, 4):
        job.train(range(steps - 2, steps))
        deslo_plugin.save(f"{url}/{steps}", job.model)
    job.close()


@pytest.mark.parametrize(
    "path, said",
    [
        (Path("s3://bucket/run/12"), "do not wrap it in pathlib.Path"),
        ("s5://bucket/run/12", r"Unsupported filesystem: 's5'; pip install 'deslo-plugin\[remote\]'"),
        ("bucket://tmp/deslo/nothing/there", "check the path: nothing is there"),
    ],
)
def test_a_url_that_leads_nowhere_is_an_error_with_what_to_do(path, said):
    with pytest.raises(ConfigError, match=said):
        deslo_plugin.load_averaged_state_dict(path)


def engine_resumed(config: dict[str, Any], url: str) -> tuple[str, int]:
    bucket.known()
    job = jobs.Job("zero 2", config)
    job.train(range(2))
    job.model.save_checkpoint(url, client_state={"batch": 2})
    before = job.states()
    job.train(range(2, 4))
    where, extra = job.model.load_checkpoint(url)
    same(before, job.states())
    job.close()
    return where, extra["batch"]


def test_an_engine_saves_to_a_store_and_finds_its_latest_there(four, tmp_path):
    config = config_for("zero 2")
    config["deslo"]["checkpoint_mode"] = "per_replica"
    for where, batch in four().run(engine_resumed, config, url_of(tmp_path)):
        assert where.endswith("global_step2") and batch == 2
    assert (tmp_path / "latest").read_text() == "global_step2"
