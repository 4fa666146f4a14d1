"""Live membership of replicas of several ranks: FSDP2, HSDP or DDP inside a replica, which dies and comes back as a
whole. Real processes, a real lighthouse; a rank that fails takes its replica with it, as under torchrun."""

import signal
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("torchft", reason="pip install 'deslo-plugin[ft]'")

from deslo_plugin.frameworks.live_source import OneSource
from tests.support import live_rank_jobs as jobs
from tests.support.torchft_world import Replicas

EVERY = {"params": 4, "exp_avg": 8, "exp_avg_sq": 8}


def desloc(when="before_step", optimizer=None, **deslo):
    params = {"lr": 1e-2, "sync_every": EVERY} | (optimizer or {})
    return {"optimizer": {"params": params}, "deslo": {"average_at": when, "timeout_s": 30} | deslo}


STOCK = {"config": {"deslo": {"sync_every": EVERY, "average_at": "after_step", "timeout_s": 30}}, "stock": True}


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(*names, ranks=2, least=1, **common):
        common = {"kind": "fsdp2", "together": ranks * len(names), "config": desloc()} | common
        jobs.append(Replicas(tmp_path, ranks=ranks, least=least, **common))
        jobs[0].start(*names)
        return jobs[0]

    yield start
    for each in jobs:
        each.close()


def expect_equal_ends(job, never_left, equal=True):
    """Every rank holds what its peers hold, parameters, states, clocks, buffers and lr schedules (``equal``: fragments
    land at steps of their own); and no step of the replica that never left was lost or done twice."""
    ends, means = job.finish(), {}
    names = sorted({key.split(".")[0] for key in ends})
    for key in ends:
        for line in job.trained(key):
            for name, mean in line["means"].items():
                assert means.setdefault(name, mean) == mean  # whoever wrote an average wrote the same
    for peers in zip(*(job.keys(name) for name in names)):
        assert all(ends[key] and (ends[key] == ends[peers[0]] or not equal) for key in peers)
        last = [[line["means"] for line in job.trained(key)[-24:]] for key in peers]
        assert any(last[0]) and all(each == last[0] for each in last)
    for key in job.keys(never_left):
        lines = job.trained(key)
        assert [line["steps"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.parametrize(
    "common",
    [
        {"kind": "fsdp2"},
        pytest.param({"kind": "hsdp"}, marks=pytest.mark.more),  # of two ranks, which hold copies
        pytest.param({"kind": "ddp"}, marks=pytest.mark.more),
        pytest.param({"kind": "fsdp2", "config": desloc(fragments=2)}, marks=pytest.mark.more),
        pytest.param({"kind": "ddp", **STOCK}, marks=pytest.mark.more),
        pytest.param({"kind": "fsdp2", **STOCK}, marks=pytest.mark.more),
    ],
    ids=["fsdp2", "hsdp", "ddp", "fsdp2, fragments", "ddp, AdamW", "fsdp2, AdamW"],
)
def test_one_rank_dies_inside_an_average_and_its_replica_comes_back_with_its_shards(job, common):
    job = job("a", "b", **common)
    job.wait(lambda: job.clock(*job.processes) > 12)
    job.doom("b.1")
    job.wait(lambda: job.ended("b"))
    assert job.processes["b.1"].exitcode == -signal.SIGKILL
    died = time.time()
    job.start("b")
    job.wait(lambda: all(job.back(key, died, replicas=2) for key in job.keys("b")))
    assert len({line["refused"] for key in job.keys("a") for line in job.trained(key)[-1:]}) == 1  # as one
    expect_equal_ends(job, never_left="a", equal="fragments" not in common.get("config", {}).get("deslo", {}))


@pytest.mark.more
@pytest.mark.parametrize("kind, mode", [("fsdp2", "averaged"), ("ddp", "per_replica")])
def test_a_replica_gives_the_last_average_and_saves_itself_and_others_start_from_it(job, tmp_path, kind, mode):
    config = desloc("after_step", state_dict="last_average")
    first = job("a", "b", kind=kind, config=config, mode=mode, observe=[16, 18])
    first.wait(lambda: first.clock(*first.processes) >= 20)
    seen = {key: [line for line in first.lines(key) if "at" in line] for key in first.processes}
    met, later = seen["a"]
    for at_16, at_18 in seen.values():
        assert at_16["own"] == at_16["last"] == at_18["last"] == met["last"]  # whole, and the same everywhere
    assert later["own"] != seen["b"][1]["own"]
    first.close()
    (again := tmp_path / "again").mkdir()
    second = Replicas(again, ranks=2, least=1, together=4, kind=kind, config=config, load=str(tmp_path / "saved"))
    try:
        second.start("a", "b")
        second.wait(lambda: second.clock(*second.processes) > 24)
        for key in second.processes:
            begun = next(line["loaded"] for line in second.lines(key) if "loaded" in line)
            saved = seen[key.replace("b", "a")][0]["saved"]
            assert {name: value for name, value in begun.items() if name not in ("lr", "scheduled")} == {
                name: value for name, value in saved.items() if name not in ("lr", "scheduled")
            }
            assert second.trained(key)[0]["steps"] == 17
        ends = second.finish()
        assert ends["a"] and ends["a"] == ends["b"] and ends["a.1"] and ends["a.1"] == ends["b.1"]
    finally:
        second.close()


@pytest.mark.more
def test_a_latecomer_of_another_config_is_refused_on_each_of_its_ranks(job):
    job = job("a", config=desloc())
    job.wait(lambda: job.clock(*job.keys("a")) > 4)
    job.start("b", config=desloc(optimizer={"weight_decay": 0.1}))
    job.wait(lambda: job.ended("b"))
    said = [job.error(key) for key in job.keys("b")]
    assert any("optimizer.weight_decay: expected 0.0 as in the replicas that train, got 0.1" in each for each in said)
    step = job.clock("a")
    job.wait(lambda: job.clock(*job.keys("a")) > step + 8)  # the others go on


@pytest.mark.parametrize(
    "make, message",
    [
        (jobs.bare, "a model that FSDP2 or DDP holds together on the ranks of a replica, got a bare one on 4 ranks"),
        (jobs.ddp_of_two, "expected a model over all 4 ranks of the replica, got one over ranks [[0, 1]"),
        (jobs.sharded_over_two, "expected a model over all 4 ranks of the replica, got one over ranks [["),
        (jobs.one_left_out, "every trained parameter in a module of fully_shard, or in DDP, got 0.weight, 0.bias"),
        (jobs.other_buffers, "initial value of parameter 1.scale"),
    ],
    ids=["bare", "DDP of two", "FSDP2 of two", "one left out", "other buffers"],
)
def test_what_the_ranks_of_a_replica_cannot_be_is_refused_on_each_of_them(four, make, message):
    for said in four().run(jobs.refused, make):
        assert message in said


@pytest.mark.parametrize("stock", [False, True], ids=["DesLoc", "AdamW"])
def test_hsdp_takes_over_parts_and_copies_as_plain_data(four, stock):
    assert all(four().run(jobs.takes_over_hsdp, stock))


def test_every_rank_takes_over_from_the_replica_that_the_first_was_given():
    given = {"quorum_id": 7, "recover_src_replica_rank": 2, "recover_src_manager_address": "two"}
    client = SimpleNamespace(_quorum=lambda **asked: SimpleNamespace(**given, recover_dst_replica_ranks=[4]))
    first = [None, [7, 1, "one", [3]]]
    source = OneSource(client, SimpleNamespace(gather=lambda told: [first, told]))
    found = source._quorum(group_rank=1)
    assert (found.recover_src_replica_rank, found.recover_src_manager_address) == (1, "one")
    assert found.recover_dst_replica_ranks == [3]
    late = OneSource(client, SimpleNamespace(gather=lambda told: [["no quorum", None], told]))
    with pytest.raises(TimeoutError, match="no quorum"):  # as it is on the first
        late._quorum(group_rank=1)
