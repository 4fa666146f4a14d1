"""Checkpoints at a URL: saved, replaced, cut off and loaded where nothing is renamed and no folder is shared."""

import errno
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from upath import UPath

import deslo_plugin
from deslo_plugin.checkpoint.folder import CURRENT, write_whole
from deslo_plugin.checkpoint.location import location
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
    shutil.move(tmp_path / "4", tmp_path.parent / "4 of another job")
    assert deslo_plugin.latest_checkpoint(url_of(tmp_path)).name == "2"
    shutil.move(tmp_path.parent / "4 of another job", tmp_path / "4")
    latest = deslo_plugin.latest_checkpoint(url_of(tmp_path))
    assert latest.name == "4", "what others write is seen"
    assert deslo_plugin.latest_checkpoint(latest) is None, "no checkpoints are in a checkpoint"
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
    for other in (b"../../elsewhere", b"", b"\xff\xfe"):
        (tmp_path / "4" / CURRENT).write_bytes(other)
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
        ("S5://bucket/run/12", "Unsupported filesystem: 's5'"),
        ("bucket://runs/nothing/there", "check the path: nothing is there"),
        ("bucket://runs/run[1]", r"got '\[', which fsspec does not take as it is; rename it"),
        ("simplecache::bucket://tmp/deslo", "got '::'"),
    ],
)
def test_a_url_that_leads_nowhere_is_an_error_with_what_to_do(path, said):
    with pytest.raises(ConfigError, match=said):
        deslo_plugin.load_averaged_state_dict(path)


def test_a_path_on_a_disk_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("job:/1", "a:b", "runs/s3://1", f"{tmp_path}/c://d", Path("job:/1"), Path("a")):
        assert location(path) == Path(path)
    for path in (f"file://{tmp_path}/a", f"FILE://{tmp_path}/a", UPath(f"file://{tmp_path}/a"), Named(tmp_path / "a")):
        found = location(path)
        assert found == tmp_path / "a" and isinstance(found, Path)
    with pytest.raises(TypeError, match="NoneType"):
        location(None)


class Named:
    """As py.path.local, and whatever else names a file."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_a_file_of_which_half_was_written_replaces_none(tmp_path):
    def half(file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    file = location(url_of(tmp_path)) / "latest"
    write_whole(file, lambda content: content.write(b"whole"))
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, half)
    assert (tmp_path / "latest").read_bytes() == b"whole"


def told(config: dict[str, Any], url: str) -> dict[str, Any]:
    """Errors that rank 2 alone meets, of kinds that only a store's package knows."""
    bucket.known()
    job = jobs.Job("plain", config)
    job.train(range(2))
    said, lost = {}, RuntimeError("connection lost")
    act = lambda: deslo_plugin.save(url, job.model, mode="per_replica")
    with mock.patch.dict(sys.modules, {"upath": None} if dist.get_rank() == 2 else {}):
        said["not installed"] = said_of(act)
    with failing(2, "tests.support.bucket.Bucket.isfile", lost):
        said["read back"] = said_of(act)
    with failing(0, "deslo_plugin.checkpoint.folder._saves", lost):  # the new one is in its place by then
        said["clear away"] = said_of(act)
    job.close()
    return said


def test_an_error_of_any_kind_on_one_rank_is_one_on_every_rank(four, tmp_path):
    for said in four().run(told, config_for("plain"), url_of(tmp_path / "c"), timeout=100):
        kind, _, text = said["not installed"]
        assert kind == "ConfigError" and "on rank(s) [2]; pip install 'deslo-plugin[remote]'" in text
        kind, _, text = said["read back"]
        assert kind == "OSError" and "RuntimeError('connection lost')" in text
        assert said["clear away"][0] == "no error"


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
