"""A save, or a load, that one rank alone fails at: every rank hears of it at once, what was there stays, training goes
on."""

import errno
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from deslo_plugin.comm.progress import Progress
from tests.support.checkpoint_configs import config_for
from tests.support.checkpoint_jobs import Job
from tests.support.failing import failing, said_of, tree_of
from tests.support.oracle import blocks
from tests.support.theory import RULES

S = RULES["mt-dao-adam-n2"]
ROOM = 300  # bytes that a full disk still takes


@contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """Writing a file of more than ``ROOM`` bytes fails on ``rank``, but for the store of the ranks, which is a file in
    these tests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def spared(call: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            try:
                return call(*args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))

        return act

    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGXFSZ, before)
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        if dist.get_rank() == rank:
            for name in ("_roll_call", "_write"):
                stack.enter_context(mock.patch.object(Progress, name, spared(getattr(Progress, name))))
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
        yield


def saves_that_fail(kind: str, config: dict, folder: str) -> dict[str, Any]:
    """What each rank hears of saves that go wrong on one, and what is left of the one before; training goes on in
    between."""
    import deslo_plugin

    job, path = Job(kind, config), Path(folder) / "c"
    job.train(range(2))
    deslo_plugin.save(path, job.model, extra={"n": 1})
    steps, said, left = 2, {}, []
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    harms = {
        "full disk, averaged": ("averaged", {}, full_disk(1)),
        "full disk, synchronized": ("synchronized", {}, full_disk(1)),
        "full disk, per_replica": ("per_replica", {}, full_disk(3)),
        "full disk on the first rank": ("averaged", {}, full_disk(0)),
        "quota at deslo.json": ("averaged", {}, failing(0, "deslo_plugin.checkpoint.content.write_manifest", quota)),
        "no permission to rename": (
            "averaged",
            {},
            failing(0, "pathlib.Path.rename", PermissionError(errno.EACCES, "Permission denied")),
        ),
        "unreadable": (
            "averaged",
            {},
            failing(2, "deslo_plugin.checkpoint.manifest.files_under", OSError(errno.EIO, "Input/output error")),
        ),
        "state on one rank": ("per_replica", {}, failing(2, tree_of(kind), RuntimeError("no such state"))),
        "state on one rank, sync": ("synchronized", {}, failing(2, tree_of(kind), RuntimeError("no such state"))),
        "code in extra, average": ("averaged", {"f": [{"g": print}]}, full_disk(-1)),
        "code in extra of one rank, exact": (
            "per_replica",
            {"f": print} if dist.get_rank() == 1 else {"f": 1},
            full_disk(-1),
        ),
    }
    for harm, (mode, extra, harmed) in harms.items():
        with harmed:
            said[harm] = said_of(lambda: deslo_plugin.save(path, job.model, mode=mode, extra=extra))
        job.train(range(steps, steps + 1))  # it can, and all ranks are past the save
        steps += 1
        dist.barrier()
        left += [each.name for each in Path(folder).iterdir()]
    before = deslo_plugin.load(path, job.model)
    job.train(range(2, 5))
    job.close()
    return {"said": said, "left": sorted(set(left)), "before": before, "steps": steps}


@pytest.mark.parametrize("kind", ["plain", "ddp", "hsdp", "zero 1", "zero 3"])
def test_every_rank_hears_at_once_and_the_checkpoint_before_is_untouched(four, tmp_path, kind):
    results = four().run(saves_that_fail, kind, config_for(kind, timeout_s=60), str(tmp_path))
    for result in results:
        assert result["said"] == results[0]["said"] and result["before"] == {"n": 1}
        assert result["left"] == ["c"]
    said = results[0]["said"]
    for harm, rank in (("averaged", 1), ("synchronized", 1), ("per_replica", 3)):
        name, number, text = said[f"full disk, {harm}"]
        assert (name, number) == (
            "OSError",
            errno.EFBIG,
        ) and f"rank {rank} failed: File too large: {tmp_path}/c.part/" in text
    assert said["full disk on the first rank"][:2] == ("OSError", errno.EFBIG)
    assert (
        said["quota at deslo.json"][1] == errno.EDQUOT
        and "rank 0 failed: Disk quota exceeded" in said["quota at deslo.json"][2]
    )
    assert said["no permission to rename"][1] == errno.EACCES
    assert said["unreadable"][1] == errno.EIO and "rank 2 failed" in said["unreadable"][2]
    assert said["state on one rank"] == ("OSError", None, "checkpoint: rank 2 failed: RuntimeError('no such state')")
    name, _, text = said["code in extra, average"]
    assert (
        name == "ConfigError"
        and "save(extra)['f'][0]['g']: expected plain values" in text
        and "got builtins.builtin_f" in text
    )
    name, _, text = said["code in extra of one rank, exact"]
    assert name == "ConfigError" and "on rank(s) [1]" in text


def asked_differently(folder: str) -> list[tuple]:
    import deslo_plugin

    job = Job("plain", blocks(S, timeout_s=60))
    return [
        said_of(
            lambda: deslo_plugin.save(
                Path(folder) / "c", job.model, mode=["per_replica", "averaged"][dist.get_rank() == 0]
            )
        )
    ]


def test_another_mode_on_one_rank_is_an_error_and_no_hang(four, tmp_path):
    for ((name, _, text),) in four().run(asked_differently, str(tmp_path)):
        assert (
            name == "ConfigError"
            and "save mode: expected averaged on every rank, as on rank 0, got per_replica on rank(s) [1, 2, 3]" in text
        )


def engine_that_fails(config: dict, folder: str) -> dict[str, Any]:
    job, path = Job("zero 2", config), Path(folder)
    engine = job.model
    job.train(range(2))
    engine.save_checkpoint(folder, tag="a")
    engine.save_16bit_model(folder)
    weights, said = (path / "pytorch_model.bin").read_bytes(), {}
    dist.barrier()
    job.train(range(2, 3))
    with full_disk(1):
        said["save_checkpoint"] = said_of(lambda: engine.save_checkpoint(folder, tag="b"))
    with full_disk(0):
        said["save_16bit_model"] = said_of(lambda: engine.save_16bit_model(folder))
    said["client_state"] = said_of(lambda: engine.save_checkpoint(folder, tag="c", client_state={"args": object()}))
    dist.barrier()
    left, loaded = sorted(each.name for each in path.iterdir()), engine.load_checkpoint(folder)[0]
    same = weights == (path / "pytorch_model.bin").read_bytes()
    job.train(range(2, 4))
    job.close()
    return {"said": said, "left": left, "loaded": loaded, "same": same}


def test_an_engine_says_it_likewise_and_its_latest_stays(four, tmp_path):
    for result in four().run(engine_that_fails, config_for("zero 2", timeout_s=60), str(tmp_path)):
        assert (
            result["said"]["save_checkpoint"][:2] == result["said"]["save_16bit_model"][:2] == ("OSError", errno.EFBIG)
        )
        assert "save(extra)['args']: expected plain values" in result["said"]["client_state"][2]
        assert result["left"] == ["a", "latest", "pytorch_model.bin", "zero_to_fp32.py"] and result["same"]
        assert result["loaded"] == str(tmp_path / "a")


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    import deslo_plugin
    from tests.support.checkpoint_jobs import alone

    model, _ = alone()
    (tmp_path / "runs" / "step_1").mkdir(parents=True)
    (tmp_path / "runs" / "step_1" / "notes.txt").write_text("mine")
    with pytest.raises(
        deslo_plugin.ConfigError, match="a folder that also holds 'step_1/notes.txt', which would be lost"
    ):
        deslo_plugin.save(tmp_path / "runs", model)
    assert (tmp_path / "runs" / "step_1" / "notes.txt").read_text() == "mine"
    deslo_plugin.save(tmp_path / "runs" / "step_2", model)
    deslo_plugin.save(tmp_path / "runs" / "step_2", model)  # a checkpoint is


def accelerator_that_fails(kind: str, blocks_: dict, ds: dict | None, folder: str) -> dict[str, Any]:
    """``save_state`` where Accelerate's own file of one rank does not fit on the disk."""
    from tests.support import accelerate_jobs

    accelerator, model, made = accelerate_jobs.prepared(
        kind, "before", "DesLoc" if ds is None else "DummyOptim", blocks_, ds
    )
    accelerate_jobs.steps(accelerator, model, made, range(2))
    accelerator.save_state(f"{folder}/a")
    with full_disk(1):
        said = said_of(lambda: accelerator.save_state(f"{folder}/b"))
    accelerate_jobs.steps(accelerator, model, made, range(2, 4))
    accelerator.load_state(f"{folder}/a")
    steps = accelerator.deslo.steps
    accelerate_jobs.steps(accelerator, model, made, range(2, 3))
    return {"said": said, "steps": steps}


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "deepspeed"])
def test_save_state_says_it_on_every_rank(four, tmp_path, kind):
    ds = (
        config_for("zero 2", timeout_s=60) | {"train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9}
        if kind == "deepspeed"
        else None
    )
    blocks_ = None if ds else blocks(S, replica_size=2, timeout_s=60)
    for result in four().run(accelerator_that_fails, kind, blocks_, ds, str(tmp_path)):
        assert result["said"][0] == "OSError" and "checkpoint: rank 1 failed: " in result["said"][2]
        assert result["steps"] == 2
