"""Live membership through torchft: real processes, a real lighthouse; replicas die, hang, and come back."""

import json
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from torchft_jobs import net, serve

import deslo_plugin

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torchft_jobs"])  # imported once: a replica starts, and starts again, in a moment
EVERY = {"params": 4, "exp_avg": 8, "exp_avg_sq": 8}
LONGEST = 8


class Job:
    """Replicas of one job, and the lighthouse that they know each other by."""

    def __init__(self, folder: Path, **common):
        os.environ.setdefault("RUST_LOG", "error")  # what the lighthouse writes
        from torchft._torchft import LighthouseServer

        self.folder, self.common, self.processes = folder, common, {}
        self.lighthouse = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=20_000, heartbeat_timeout_ms=1000)

    def start(self, *names, **own):
        port = self.lighthouse.address().rsplit(":", 1)[1]
        for name in names:
            job = {"name": name, "folder": str(self.folder), "lighthouse": f"http://localhost:{port}", "timeout_s": 3, "pace": 0.01}
            self.processes[name] = PROCESSES.Process(target=serve, args=(job | self.common | own,), daemon=True)
            self.processes[name].start()

    def ended(self, *names):
        return all(not self.processes[name].is_alive() for name in names)

    def error(self, name):
        return (self.folder / f"{name}.err").read_text()

    def lines(self, name):
        log = self.folder / f"{name}.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def clock(self, name):
        return max([0, *(line["steps"] for line in self.lines(name) if "steps" in line)])

    def wait(self, condition, seconds=40):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                said = {path.name: path.read_text()[-1500:] for path in self.folder.glob("*.err")}
                raise AssertionError(f"waited {seconds} s; {said}")
            time.sleep(0.01)

    def finish(self):
        """Lets every replica train to one clock and returns what each ends with."""
        stop = max(map(self.clock, self.processes)) // LONGEST * LONGEST + 6 * LONGEST
        (self.folder / "stop.new").write_text(str(stop))
        (self.folder / "stop.new").rename(self.folder / "stop")
        self.wait(lambda: self.ended(*self.processes))
        return {name: self.lines(name)[-1].get("done") for name in self.processes}

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.join(timeout=10)
        self.lighthouse.shutdown()


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(*names, together=3, **common):
        jobs.append(Job(tmp_path, together=together, **common))
        jobs[0].start(*names)
        return jobs[0]

    yield start
    for each in jobs:
        each.close()


def desloc(when="before_update", **params):
    return {"optimizer": {"params": {"lr": 1e-2, "sync_every": EVERY} | params}, "deslo": {"when": when, "timeout_s": 30}}


def trained(job, name):
    return [line for line in job.lines(name) if "loss" in line]


def back(job, name, since):
    """Whether ``name`` trains again with the other two and has landed an average."""
    return any(line["time"] > since and line["params"] >= 1 and line["replicas"] == 3 for line in trained(job, name)[-1:])


def expect_equal_ends(job, never_left):
    """All parameters, states, clocks, buffers and lr schedules; and no step of those that never left was lost or done twice."""
    ends = job.finish()
    assert all(end and end == ends["a"] for end in ends.values())
    for name in never_left:
        lines = trained(job, name)
        assert [line["steps"] for line in lines] == list(range(1, len(lines) + 1))
        assert max(line["loss"] for line in lines[30:]) < lines[0]["loss"]


CASES = {
    "adam": {"config": desloc()},
    "adopt, after_update, outer": {
        "config": desloc("after_update", rule="adopt", betas=[0.9, 0.99], outer={"lr": 0.9, "momentum": 0.5})},
    "stock AdamW": {"config": {"deslo": {"sync_every": EVERY, "when": "after_update", "timeout_s": 30}}, "stock": True},
}




@pytest.mark.parametrize("case", CASES)
def test_a_replica_that_dies_inside_an_average_hurts_nobody_and_comes_back(job, case):
    job = job("a", "b", **CASES[case])
    job.start("c", dies_at=24)
    job.wait(lambda: job.ended("c"))
    died = time.time()
    assert job.processes["c"].exitcode == -signal.SIGKILL
    job.start("c")
    job.wait(lambda: min(map(job.clock, "ab")) > 32)
    for name in "ab":
        line = next(line for line in trained(job, name) if line["steps"] == 32)
        assert line["refused"] == 1  # the average in which c died, and no other
    job.wait(lambda: back(job, "c", died))
    assert min(line["steps"] for line in trained(job, "c") if line["time"] > died) >= 32
    expect_equal_ends(job, never_left="ab")


def test_replicas_killed_at_any_moment_one_after_the_other(job):
    job, chance = job("a", "b", "c", config=desloc()), random.Random(5)
    for name in "bc":
        job.wait(lambda: min(map(job.clock, "abc")) > 20)
        time.sleep(chance.uniform(0, 0.1))
        job.processes[name].kill()
        died = time.time()
        job.start(name)
        job.wait(lambda: back(job, name, died))
    expect_equal_ends(job, never_left="a")


def test_a_replica_that_hangs_is_left_out_and_takes_over_the_others_state_when_it_wakes(job):
    job = job("a", "b", "c", config=desloc())
    job.wait(lambda: min(map(job.clock, "abc")) > 10)
    os.kill(job.processes["c"].pid, signal.SIGSTOP)
    asleep = job.clock("a")
    job.wait(lambda: min(map(job.clock, "ab")) > asleep + 30)
    os.kill(job.processes["c"].pid, signal.SIGCONT)
    woke = time.time()
    job.wait(lambda: back(job, "c", woke))
    expect_equal_ends(job, never_left="ab")
    jumps = [after["steps"] - before["steps"] for before, after in zip(trained(job, "c"), trained(job, "c")[1:])]
    assert max(jumps) > 10  # it took over, and did not train on alone


def test_a_latecomer_of_another_config_is_refused_and_the_others_go_on(job):
    job = job("a", "b", together=2, config=desloc())
    job.wait(lambda: min(map(job.clock, "ab")) > 4)
    job.start("c", config=desloc(weight_decay=0.1))
    job.wait(lambda: job.ended("c"))
    assert job.processes["c"].exitcode == 3
    said = job.error("c")
    assert "optimizer.weight_decay: expected 0.0 as in the replicas that train, got 0.1; start this replica" in said
    del job.processes["c"]
    expect_equal_ends(job, never_left="ab")


@pytest.mark.parametrize("own, message", [
    ({"seed": 3}, "initial values of the parameters: expected the same on every replica, got another on replica"),
    ({"config": desloc(weight_decay=0.1)}, "config and param groups: expected the same on every replica"),
])
def test_founders_that_differ_are_refused_everywhere(job, own, message):
    job = job("a", together=2, **{"config": desloc()})
    job.start("b", **own)
    job.wait(lambda: job.ended("a", "b"))
    for name, process in job.processes.items():
        assert process.exitcode == 3 and message in job.error(name)


def test_nan_in_one_replica_stops_all_of_them(job):
    job = job("a", together=2, config=desloc())
    job.start("b", nan_at=9)
    job.wait(lambda: job.ended("a", "b"))
    for name, process in job.processes.items():
        said = job.error(name)
        assert process.exitcode == 4 and "after step 12: expected finite values, got NaN or inf from rank(s) [1]" in said
        assert job.clock(name) == 12


class Idle:
    """What ``attach`` looks at in a manager before it trains."""

    _use_async_quorum, _init_sync, _group_world_size = False, False, 1


@pytest.mark.parametrize("manager, deslo, message", [
    ({"_use_async_quorum": True}, {}, "torchft.Manager(use_async_quorum=...): expected False, got True"),
    ({"_init_sync": True}, {}, "torchft.Manager(init_sync=...): expected False, got True"),
    ({"_group_world_size": 2}, {}, "torchft.Manager(world_size=...): expected 1, got 2"),
    ({}, {"delay": 2}, "deslo.delay: expected 1 with a torchft manager, got 2"),
    ({}, {"synchronous_steps": 5}, "deslo.synchronous_steps: expected 0 with a torchft manager, got 5"),
    ({}, {"initial_params": "broadcast"}, "deslo.initial_params: expected check with a torchft manager, got broadcast"),
    ({}, {"replica_size": 2}, "deslo.replica_size: expected 1 with a torchft manager, got 2"),
])
def test_what_does_not_go_with_live_membership_is_refused(manager, deslo, message):
    model = net(0)
    optimizer = deslo_plugin.DesLoc(model.parameters(), {"deslo": deslo})
    with pytest.raises(deslo_plugin.ConfigError, match=re.escape(message)):
        deslo_plugin.attach(model, optimizer, manager=type("Manager", (Idle,), manager)())
