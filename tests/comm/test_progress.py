"""Who is late or dead, named by those that wait for it; how fast each replica steps, and which slows the others
down."""

import re
import socket

import pytest

from deslo_plugin.comm import step_rate
from deslo_plugin.comm.step_rate import StepRate, Stragglers
from tests.support import torch_error_jobs, torch_use_jobs
from tests.support.oracle import blocks
from tests.support.theory import RULES
from tests.support.worlds import Processes

S = RULES["des-loc-adam"]  # params every 3 steps, biases every 2


FILE_AND_TCP = pytest.mark.parametrize("world", ["file", "tcp"], indirect=True)


@pytest.fixture
def world(request, tmp_path):
    """Three ranks; by tcp rank 0 hosts the store."""
    rendezvous = None
    if request.param == "tcp":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            rendezvous = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    world = Processes(3, tmp_path, rendezvous)
    yield world
    world.close()


@pytest.mark.parametrize("world, overlap", [("file", True), ("tcp", False)], indirect=["world"])
def test_a_late_rank_is_named_with_its_last_step_by_all_that_wait_for_it(world, overlap):
    """Rank 1 stops coming before step 5; the average after step 4 has landed, that after step 6 is missed."""
    outcomes = world.outcomes(torch_error_jobs.missing, blocks(S, timeout_s=2.0, overlap_comm=overlap), "late", 1, 5)
    for error in outcomes[:1] + outcomes[2:]:
        assert re.search(
            r"AverageError: .*; rank 1 has not come to it \(its last average was after step 4, \d+\.\d s ago\)", error
        )
        assert "rank 0 " not in error and "rank 2 " not in error


@FILE_AND_TCP
def test_a_rank_that_died_while_an_average_travelled_is_named(world):
    """Rank 1 is killed under the forward of step 4, when the average after step 4 is on its way: it never says whether
    that may land."""
    outcomes = world.outcomes(torch_error_jobs.missing, blocks(S, timeout_s=30.0), "dead", 1, 4)
    assert outcomes[1] == "the process died"
    for error in outcomes[:1] + outcomes[2:]:
        assert re.search(
            r"AverageError: .*; rank 1 has not come to it \(its last average was after step 4, \d+\.\d s ago\)", error
        )
        assert "rank 0 " not in error and "rank 2 " not in error


def test_a_store_that_died_with_its_host_is_said(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = Processes(3, tmp_path, f"tcp://127.0.0.1:{port}")
    try:
        for error in world.outcomes(torch_error_jobs.missing, blocks(S, timeout_s=30.0), "dead", 0, 4)[1:]:
            assert re.search(
                "AverageError: .*; the store that knows who is late gave no answer in 5 s: its host", error
            )
    finally:
        world.close()


def test_a_pace_leaves_out_what_was_waited_for_others():
    now = [0.0]
    own = StepRate(clock=lambda: now[0])

    def at(seconds, steps, waited=0.0):
        now[0] = seconds
        own.waited(waited)
        own.reached(steps)
        return own.rate

    assert at(5, 3) is None  # nothing is known of what came before the first average
    assert at(20, 6, waited=9.0) == 3 / 6
    assert at(30, 6) == 3 / 6  # another state's average after the same step
    assert at(50, 16) == 10 / 30
    assert at(60, 4) is None and at(62, 8) == 4 / 2  # a load went back


@pytest.mark.parametrize(
    "rounds, named",
    [
        ([{0: 4.0, 1: 2.9, 2: 4.1}] * 9, [1]),  # once
        ([{0: 4.0, 1: 3.1, 2: 4.1}] * 9, []),  # by less than a quarter
        # never three times in a row
        ([{0: 4.0, 1: 2.0, 2: 4.0}, {0: 4.0, 1: 2.0, 2: 4.0}, {0: 4.0, 1: 4.0, 2: 4.0}] * 3, []),
        ([{0: 1.0, 1: 4.0}] * 3, [0]),  # of two
        ([{0: 4.0, 1: 2.0}, {}, {1: 2.0, 0: 4.0}, {0: 4.0, 1: 2.0}], [1]),  # a look that found nothing is none
        ([{0: 2.0}] * 5, []),
        ([{0: 80.0, 1: 25.0}] * 9, []),  # of steps of a few milliseconds that is noise
    ],
)
def test_a_replica_is_slow_by_a_quarter_three_times_in_a_row(monkeypatch, rounds, named):
    said, stragglers = [], Stragglers()
    monkeypatch.setattr(step_rate, "log_rank0", lambda message, level: said.append(message))
    for rates in rounds:
        stragglers.look(rates)
    assert [int(re.search(r"replica (\d) is slow", message)[1]) for message in said] == named


@FILE_AND_TCP
def test_real_replicas_name_the_slow_one(world):
    """Rank 2 needs three times as long for a step."""
    results = world.run(torch_use_jobs.stragglers, blocks(S), 2)
    for result in results:
        assert result["rates"] == pytest.approx({0: 1 / 100, 1: 1 / 100, 2: 1 / 300}, rel=0.2)
        assert result["early"] == {}
    assert re.findall(r"replica (\d) is slow", results[0]["log"]) == ["2"]
    assert all("is slow" not in result["log"] for result in results[1:])
