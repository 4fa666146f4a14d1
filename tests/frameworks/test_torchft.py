"""Live membership through torchft: real processes, a real lighthouse; replicas die, hang, and come back."""

import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchft", reason="pip install 'deslo-plugin[ft]'")

from torchft.checkpointing import HTTPTransport

import deslo_plugin
from deslo_plugin.frameworks.live_source import read_as_data
from tests.support.torchft_jobs import net
from tests.support.torchft_world import Replicas

ROOT = Path(__file__).resolve().parents[2]
EVERY = {"params": 4, "exp_avg": 8, "exp_avg_sq": 8}


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(*names, together=3, **common):
        jobs.append(Replicas(tmp_path, together=together, **common))
        jobs[0].start(*names)
        return jobs[0]

    yield start
    for each in jobs:
        each.close()


def desloc(when="before_step", **params):
    return {
        "optimizer": {"params": {"lr": 1e-2, "sync_every": EVERY} | params},
        "deslo": {"average_at": when, "timeout_s": 30},
    }


def expect_equal_ends(job, never_left):
    """All parameters, states, clocks, buffers and lr schedules; and no step of those that never left was lost or done
    twice."""
    ends = job.finish()
    assert all(end and end == ends["a"] for end in ends.values())
    means = [mean for name in ends for line in job.trained(name) for mean in line["means"].items()]
    assert len(set(means)) == len(dict(means)) > 0  # whoever wrote an average wrote the same
    for name in never_left:
        lines = job.trained(name)
        assert [line["steps"] for line in lines] == list(range(1, len(lines) + 1))
        assert max(line["loss"] for line in lines[30:]) < lines[0]["loss"]


CASES = {
    "adam": {"config": desloc()},
    "adaptive": {"config": desloc(sync_every=EVERY | {"exp_avg_sq": {"adaptive": {"min": 4, "max": 8, "drift": 1.0}}})},
    "adopt, after_update, outer": {
        "config": desloc("after_step", rule="adopt", betas=[0.9, 0.99], outer_optimizer={"lr": 0.9, "momentum": 0.5})
    },
    "stock AdamW": {
        "config": {"deslo": {"sync_every": EVERY, "average_at": "after_step", "timeout_s": 30}},
        "stock": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_replica_that_dies_inside_an_average_hurts_nobody_and_comes_back(job, case):
    job = job("a", "b", "c", **CASES[case])
    job.wait(lambda: job.clock(*"abc") > 20)
    job.doom("c")
    job.wait(lambda: job.ended("c"))
    died, refused_at = time.time(), job.clock("c")
    assert job.processes["c"].exitcode == -signal.SIGKILL
    job.start("c")
    job.wait(lambda: job.back("c", died))
    for name in "ab":
        line = next(line for line in job.trained(name) if line["steps"] == refused_at + 4)
        assert line["refused"] == 1  # the average in which c died, and no other
    expect_equal_ends(job, never_left="ab")


def test_replicas_killed_at_any_moment_one_after_the_other(job):
    job, chance = job("a", "b", "c", config=desloc()), random.Random(5)
    for name in "bc":
        job.wait(lambda: job.clock(*"abc") > 20)
        time.sleep(chance.uniform(0, 0.1))
        job.processes[name].kill()
        died = time.time()
        job.start(name)
        job.wait(lambda: job.back(name, died))
    expect_equal_ends(job, never_left="a")


def test_a_replica_that_hangs_is_left_out_and_takes_over_the_others_state_when_it_wakes(job):
    job = job("a", "b", "c", config=desloc())
    job.wait(lambda: job.clock(*"abc") > 10)
    os.kill(job.processes["c"].pid, signal.SIGSTOP)
    asleep = job.clock("a")
    job.wait(lambda: job.clock(*"ab") > asleep + 30)
    os.kill(job.processes["c"].pid, signal.SIGCONT)
    woke = time.time()
    job.wait(lambda: job.back("c", woke))
    expect_equal_ends(job, never_left="ab")
    jumps = [after["steps"] - before["steps"] for before, after in zip(job.trained("c"), job.trained("c")[1:])]
    assert max(jumps) > 10  # it took over, and did not train on alone


def test_a_latecomer_of_another_config_is_refused_and_the_others_go_on(job):
    job = job("a", "b", together=2, config=desloc())
    job.wait(lambda: job.clock(*"ab") > 4)
    job.start("c", config=desloc(weight_decay=0.1))
    job.wait(lambda: job.ended("c"))
    assert job.processes["c"].exitcode == 3
    said = job.error("c")
    assert "optimizer.weight_decay: expected 0.0 as in the replicas that train, got 0.1; start this replica" in said
    del job.processes["c"]
    expect_equal_ends(job, never_left="ab")


@pytest.mark.parametrize(
    "own, message",
    [
        ({"seed": 3}, "initial values of the parameters: expected the same on every replica, got another on replica"),
        ({"config": desloc(weight_decay=0.1)}, "config and param groups: expected the same on every replica"),
    ],
)
def test_founders_that_differ_are_refused_everywhere(job, own, message):
    job = job("a", together=2, config=desloc())
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
        assert (
            process.exitcode == 4 and "after step 12: expected finite values, got NaN or inf from rank(s) [1]" in said
        )
        assert job.clock(name) == 12


SMALL = ["--batch", "2", "--context", "32"]


def test_the_example_trains(job, tmp_path):
    job = job()  # the lighthouse alone
    example = [sys.executable, str(ROOT / "examples" / "live.py"), "--sync-every", "16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHFT_LIGHTHOUSE": job.address}
    replicas = [
        subprocess.Popen(
            [*example, "--replica", name, "--steps", "20", "--host", "localhost", *SMALL],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in "ab"
    ]
    try:
        for replica in replicas:
            said, _ = replica.communicate(timeout=120)
            assert replica.returncode == 0
            assert "replicas 2  averages 1 of params, 0 refused" in said.splitlines()[-1]
    finally:
        for replica in replicas:
            replica.kill()
            replica.wait(timeout=10)


class Idle:
    """What ``attach`` looks at in a manager before it trains."""

    _use_async_quorum, _init_sync, _group_world_size, _group_rank = False, False, 1, 0

    def register_state_dict_fn(self, key, load, save):
        pass


@pytest.mark.parametrize(
    "manager, deslo, message",
    [
        ({"_use_async_quorum": True}, {}, "torchft.Manager(use_async_quorum=...): expected False, got True"),
        ({"_init_sync": True}, {}, "torchft.Manager(init_sync=...): expected False, got True"),
        ({"_group_rank": 1}, {}, "torchft.Manager(rank=...): expected 0, as in torch.distributed"),
        ({"_group_world_size": 2}, {}, "torchft.Manager(world_size=...): expected 1, as in torch.distributed"),
        ({}, {"sync_delay": 2}, "deslo.sync_delay: expected 1 with a torchft manager, got 2"),
        ({}, {"synchronous_steps": 5}, "deslo.synchronous_steps: expected 0 with a torchft manager, got 5"),
        (
            {},
            {"initial_params": "broadcast"},
            "deslo.initial_params: expected check with a torchft manager, got broadcast",
        ),
        ({}, {"transport": "host"}, "deslo.transport: expected device with a torchft manager, got host"),
        ({}, {"replica_size": 2}, "deslo.replica_size: expected 1 with a torchft manager, got 2"),
    ],
)
def test_what_does_not_go_with_live_membership_is_refused(manager, deslo, message):
    model = net(0)
    optimizer = deslo_plugin.DesLoc(model.parameters(), {"deslo": deslo})
    with pytest.raises(deslo_plugin.ConfigError, match=re.escape(message)):
        deslo_plugin.attach(model, optimizer, manager=type("Manager", (Idle,), manager)())


def test_an_outer_rate_by_the_number_of_replicas_is_refused_where_it_comes_and_goes():
    model = net(0)
    optimizer = deslo_plugin.DesLoc(model.parameters(), outer_optimizer={"momentum": 0.9})
    with pytest.raises(deslo_plugin.ConfigError, match=r"outer_optimizer.lr: expected a number with a torchft manager"):
        deslo_plugin.attach(model, optimizer, manager=Idle())


def test_calls_that_ask_other_replicas_are_refused_and_those_of_one_replica_work(tmp_path):
    model = net(0)
    deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters()), manager=Idle())
    for ask in (deslo_plugin.sync_replicas, lambda model: deslo_plugin.averaged_weights(model).__enter__()):
        with pytest.raises(
            deslo_plugin.ConfigError, match="replicas that are there from start to end, got those of a torchft"
        ):
            ask(model)
    with pytest.raises(deslo_plugin.ConfigError, match=re.escape('save(mode=...): expected "averaged" or')):
        deslo_plugin.save(tmp_path / "saved", model, mode="synchronized")
    with pytest.raises(deslo_plugin.ConfigError, match=re.escape('expected "deslo": {"state_dict": "last_average"}')):
        deslo_plugin.averaged_state_dict(model)
    deslo_plugin.save(tmp_path / "saved", model, extra={"batch": 7})
    other = net(1)
    deslo_plugin.attach(other, deslo_plugin.DesLoc(other.parameters()), manager=Idle())
    assert deslo_plugin.load(tmp_path / "saved", other)["batch"] == 7
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


class Marked:
    """Runs code where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_nothing_that_another_replica_serves_is_run(tmp_path):
    wait = timedelta(seconds=60)
    served, asks = HTTPTransport(wait, num_chunks=0), HTTPTransport(wait, num_chunks=0)
    unread = read_as_data(asks)
    state = {"deslo": {"weight": torch.arange(5.0), "steps": 3}, "schedule": {"last_epoch": 3, "_last_lr": [0.1]}}
    served.send_checkpoint([1], 5, state, wait)
    found = asks.recv_checkpoint(0, served.metadata(), 5, wait)
    assert torch.equal(found["deslo"].pop("weight"), state["deslo"].pop("weight")) and found == state and not unread
    served.disallow_checkpoint()
    served.send_checkpoint([1], 6, {"data": Marked(tmp_path / "ran")}, wait)
    with pytest.raises(pickle.UnpicklingError):
        asks.recv_checkpoint(0, served.metadata(), 6, wait)
    assert not (tmp_path / "ran").exists()
    assert "state registered with the torchft manager: expected tensors, numbers and text" in str(unread[0])
    assert "posix.mkdir" in str(unread[0])
    with pytest.raises(deslo_plugin.ConfigError, match="num_chunks"):
        read_as_data(HTTPTransport(wait, num_chunks=2))
