"""Saves that write in the background: the bits of a save that waits, errors on every rank, kills, and who waits."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import deslo_plugin
from deslo_plugin.checkpoint import content
from tests.support import checkpoint_jobs as jobs
from tests.support.checkpoint_configs import S, config_for, same
from tests.support.failing import failing, said_of
from tests.support.oracle import blocks
from tests.support.worlds import STARTED, Processes

MODES = ["averaged", "per_replica", "synchronized"]


@contextmanager
def held() -> Iterator[threading.Event]:
    """Files are written once the event is set, or the body has ended."""
    go, write = threading.Event(), content.write_tree

    def later(*args: Any, **options: Any) -> None:
        assert go.wait(600)
        write(*args, **options)

    with mock.patch("deslo_plugin.checkpoint.content.write_tree", later):
        try:
            yield go
        finally:
            go.set()


def saved_while_training(kind: str, config: dict, folder: str, mode: str) -> dict[str, Any]:
    """A save that waits, then one in the background of the same moment, while three steps and averages are made."""
    job, path = jobs.Job(kind, config), Path(folder)
    job.train(range(4))
    extra = {"rank": dist.get_rank(), "of": torch.arange(3.0)}
    deslo_plugin.save(path / "waited", job.model, mode=mode, extra=extra)
    with held() as go:
        pending = deslo_plugin.save(path / "behind", job.model, mode=mode, extra=extra, wait=False)
        extra["of"].zero_()
        job.train(range(4, 7))
        done, there = pending.done(), (path / "behind").exists()
        go.set()
    pending.wait()
    job.train(range(7, 8))
    states = job.states()
    job.close()
    return {"early": (done, there), "done": pending.done(), "states": states}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["plain", "hsdp", "zero 2"])
def test_what_is_written_behind_training_has_the_bits_of_a_save_that_waits(four, tmp_path, kind, mode):
    results = four().run(saved_while_training, kind, config_for(kind), str(tmp_path), mode)
    assert all(result["early"] == (False, False) and result["done"] for result in results)
    files = {path.relative_to(tmp_path / "waited") for path in (tmp_path / "waited").rglob("*") if path.is_file()}
    for file in files:
        if file.suffix != ".pt" and file.name not in (
            "deslo.json",
            ".metadata",
        ):  # of these, what they hold is compared
            assert (tmp_path / "waited" / file).read_bytes() == (tmp_path / "behind" / file).read_bytes(), file
    loads = [four().run(jobs.loaded, kind, config_for(kind), str(tmp_path / name)) for name in ("waited", "behind")]
    for waited, behind in zip(*loads):
        same(waited["states"], behind["states"])
        assert waited["steps"] == behind["steps"] == 4
        assert waited["extra"]["rank"] == behind["extra"]["rank"]
        assert torch.equal(waited["extra"]["of"], behind["extra"]["of"])
    if mode != "synchronized":  # training does not notice
        for result, alone in zip(results, four().run(jobs.unsaved, kind, config_for(kind), 8)):
            same(result["states"], alone)


def saves_that_fail_behind(config: dict, folder: str) -> dict[str, Any]:
    job, path = jobs.Job("plain", config), Path(folder) / "c"
    job.train(range(2))
    deslo_plugin.save(path, job.model, extra={"n": 1})
    said, quota = {}, OSError(errno.EDQUOT, "Disk quota exceeded")

    def behind() -> Any:
        with failing(2, "deslo_plugin.checkpoint.content.write_plain", quota):
            pending = deslo_plugin.save(path, job.model, mode="per_replica", wait=False)
            while not pending.done():
                time.sleep(0.01)
        return pending

    job.train(range(2, 3))
    behind()
    said["next save"] = said_of(lambda: deslo_plugin.save(path, job.model))
    behind()
    said["next load"] = said_of(lambda: deslo_plugin.load(path, job.model))
    said["wait"] = said_of(behind().wait)
    pending = behind()
    if dist.get_rank() == 0:
        said_of(pending.wait)  # one rank knows it: the others must hear of it, and nobody may hang
    said["save that others wait for"] = said_of(lambda: deslo_plugin.save(path, job.model))
    before = deslo_plugin.load(path, job.model)
    said["told once"] = said_of(lambda: deslo_plugin.save(path, job.model, extra={"n": 2}, wait=False).wait())
    job.train(range(2, 4))
    return {"said": said, "before": before, "left": sorted(each.name for each in Path(folder).iterdir())}


def test_an_error_of_one_ranks_writer_is_raised_on_every_rank(four, tmp_path):
    for result in four().run(saves_that_fail_behind, blocks(S, timeout_s=60), str(tmp_path)):
        for when in ("next save", "next load", "wait", "save that others wait for"):
            name, number, text = result["said"][when]
            assert (name, number) == ("OSError", errno.EDQUOT) and "rank 2 failed: Disk quota exceeded" in text, when
        assert result["said"]["told once"][0] == "no error"
        assert result["before"] == {"n": 1} and result["left"] == ["c"]


def order_of_saves(folder: str) -> list[int]:
    """Which checkpoints are there when a second save, and a load, come back."""
    job, path = jobs.Job("plain", blocks(S)), Path(folder)
    seen = []
    with held() as go:
        first = deslo_plugin.save(path / "1", job.model, wait=False)
        threading.Timer(0.3, go.set).start()
        second = deslo_plugin.save(path / "2", job.model, wait=False)
        seen.append(first.done() and (path / "1" / "deslo.json").exists())
    deslo_plugin.load(path / "1", job.model)
    return [*seen, second.done() and (path / "2" / "deslo.json").exists()]


def test_the_next_save_and_a_load_wait(four, tmp_path):
    assert four().run(order_of_saves, str(tmp_path)) == [[True, True]] * 4


def killed_behind(config: dict, folder: str) -> str:
    """Saves; rank 2 dies in the thread that writes a second save."""
    job = jobs.Job("plain", config)
    job.train(range(2))
    deslo_plugin.save(folder, job.model)
    job.train(range(2, 3))
    if dist.get_rank() == 2:
        torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return said_of(deslo_plugin.save(folder, job.model, mode="per_replica", wait=False).wait)[2]


def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    world = Processes(4, tmp_path)
    said = world.outcomes(killed_behind, blocks(S), str(tmp_path / "c"), timeout=20)
    world.close()
    assert "no error" not in said and "the process died" in said[2]
    assert deslo_plugin.latest_checkpoint(tmp_path) == tmp_path / "c"
    jobs.net(8).load_state_dict(deslo_plugin.load_averaged_state_dict(tmp_path / "c"))


def test_a_process_killed_anywhere_while_it_writes_leaves_a_whole_checkpoint(tmp_path):
    for seed in range(10):
        begun, tell = STARTED.Pipe(duplex=False)
        args = (tmp_path / "c", 1000 * seed, tell, False)
        child = STARTED.Process(target=jobs.save_on_and_on, args=args, daemon=True)
        child.start()
        assert begun.poll(600)
        time.sleep(0.01 * seed)
        child.kill()
        child.join(timeout=10)
        weights = deslo_plugin.load_averaged_state_dict(tmp_path / "c") if (tmp_path / "c").exists() else {}
        values = {float(each) for tensor in weights.values() for each in tensor.flatten()}
        assert len(values) == 1 and values.pop() >= 1000 * (seed - 1)


def ends(rank: int, folder: Path, how: str) -> None:
    """A rank of two whose files take their time, and which does not wait for them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with held() as go:
        threading.Timer(0.5, go.set).start()
        model = jobs.net(7)
        deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), {"deslo": {"replica_size": 1}}))
        deslo_plugin.save(folder / "c", model, wait=False)
        if how == "groups":
            dist.destroy_process_group()
            assert (folder / "c" / "deslo.json").exists()


def ends_before_a_pool_is_asked(rank: int, folder: Path, how: str) -> None:
    """As ``ends``, for a store whose package asks a pool of threads, as asyncio does for the address of a host."""
    write = content.write_tree

    def later(*args: Any, **options: Any) -> None:
        time.sleep(1)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(write, *args, **options).result()

    content.write_tree = later
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = jobs.net(7)
    deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), {"deslo": {"replica_size": 1}}))
    deslo_plugin.save(folder / "c", model, wait=False)


@pytest.mark.parametrize("ends, how", [(ends, "process"), (ends, "groups"), (ends_before_a_pool_is_asked, "process")])
def test_the_end_of_a_process_and_of_its_groups_waits_for_the_files(tmp_path, ends, how):
    ranks = [STARTED.Process(target=ends, args=(rank, tmp_path, how)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=600)
        assert rank.exitcode == 0
    assert (tmp_path / "c" / "deslo.json").exists() and not (tmp_path / "c.part").exists()
