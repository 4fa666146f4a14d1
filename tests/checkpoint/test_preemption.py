"""SIGTERM: every rank stops after the same step, saves and leaves with status 0; nothing is lost."""

import itertools
import json
import os
import random
import signal
import threading
import time

import pytest
import torch.distributed as dist

from deslo_plugin.comm.common_last_step import LastStep
from tests.support.launching import Launch, launched

RANKS, PERIOD = 4, 5


def test_the_last_step_is_three_periods_away_at_most_however_ranks_run_apart():
    """Whoever comes first in ``order`` goes on until it must wait: no clock takes part."""
    furthest, orders = 0, itertools.permutations(range(RANKS))
    for order, asks, when in itertools.product(orders, range(RANKS), range(1, 2 * PERIOD + 1)):
        store, ended, stopped = dist.HashStore(), [0] * RANKS, [False] * RANKS
        last = [LastStep(store, rank, range(RANKS), 20) for rank in range(RANKS)]
        while not all(stopped):
            free = [rank for rank in order if not stopped[rank] and ended[rank] // PERIOD <= min(ended) // PERIOD]
            rank = free[0]
            ended[rank] += 1
            if rank == asks and ended[rank] == when:
                last[rank].request_stop()
            stopped[rank] = last[rank].stop_requested() and last[rank].is_last_step(ended[rank])
        assert len(set(ended)) == 1 and when <= ended[0] <= when + 3 * PERIOD
        furthest = max(furthest, ended[0] - when)
    assert furthest == 3 * PERIOD, "some order needs all of it"


@pytest.mark.parametrize("seed", range(12))
def test_ranks_at_different_steps_stop_after_the_same_one(seed):
    """Ranks run apart within a period, as replicas do, and wait for each other where an average lands."""
    store, average, ended = dist.HashStore(), threading.Barrier(RANKS, timeout=300), [0] * RANKS
    asks, when = seed % RANKS, random.Random(seed).randrange(1, 4 * PERIOD)

    def train(rank: int) -> None:
        last, delays, asked = LastStep(store, rank, range(RANKS), 20), random.Random(100 * seed + rank), False
        for step in range(1, 20 * PERIOD):
            if step % PERIOD == 1 and step > 1:
                average.wait()
            time.sleep(delays.random() * 0.003)
            ended[rank] = step
            if rank == asks and step == when:
                last.request_stop()
            asked = asked or last.stop_requested()
            if asked and last.is_last_step(step):
                return

    threads = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    # who has not heard of it in this period has announced a step by the end of the next; the first rank closes the list
    # at its first step after that, when others may have ended that period, too
    assert len(set(ended)) == 1 and when <= ended[0] <= when + 3 * PERIOD


SCRIPT = """
import json, os, sys, time
import torch, torch.distributed as dist
import deslo_plugin

folder, steps = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
optimizer = deslo_plugin.DesLoc(model.parameters(), {"optimizer": {"params": {"lr": 0.01, "sync_every": {"params": 7}}},
                                                     "deslo": {"checkpoint_mode": "per_replica", "timeout_s": 60}})
attachment = deslo_plugin.attach(model, optimizer)
preemption = deslo_plugin.Preemption(model)
newest = deslo_plugin.latest_checkpoint(folder)
first = deslo_plugin.load(newest, model)["step"] if newest else 0
for step in range(first, steps):
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + step)
    model(torch.randn(8, 4, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if not newest and dist.get_rank() == 0 and step == 3:
        open(f"{folder}/started", "w").write(str(os.getpid()))
    if not newest and steps > 100:
        time.sleep(0.002 * (1 + dist.get_rank()))
    if preemption.should_stop():
        preemption.save_and_exit(f"{folder}/last", extra={"step": step + 1})
json.dump([first, step + 1, float(model.weight.sum())], open(f"{folder}/rank{dist.get_rank()}.json", "w"))
dist.barrier()
os._exit(0)
"""


def script_in(folder):
    (folder / "script.py").write_text(SCRIPT)
    return folder / "script.py"


def test_one_rank_that_gets_sigterm_ends_the_job_and_a_new_one_goes_on_from_there(tmp_path):
    job = Launch([script_in(tmp_path), tmp_path, 10**6], 3, tmp_path)
    until = time.monotonic() + 600
    while (
        not (tmp_path / "started").exists() and time.monotonic() < until and all(each.is_alive() for each in job.ranks)
    ):
        time.sleep(0.1)
    os.kill(int((tmp_path / "started").read_text()), signal.SIGTERM)  # one rank of three
    assert job.wait() == [0, 0, 0], job.said("err")
    steps = json.loads((tmp_path / "last" / "deslo.json").read_text())["proof"]["steps"]
    assert f"saved {tmp_path / 'last'} after step {steps}" in job.said("err")

    launched([script_in(tmp_path), tmp_path, steps + 20], 3, tmp_path)
    resumed = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    (straight := tmp_path / "straight").mkdir()
    launched([script_in(straight), straight, steps + 20], 3, straight)
    for rank, (first, last, total) in enumerate(resumed):
        assert (first, last) == (steps, steps + 20)
        assert total == json.loads((straight / f"rank{rank}.json").read_text())[2]  # to the last bit
