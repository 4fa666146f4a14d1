"""Averages through host memory and gloo: the same bits as from device to device, in one order, with the same errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deslo_plugin import load_config
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.planning import transport_choice
from deslo_plugin.planning.plan import make_plan
from deslo_plugin.planning.route import Route
from tests.support import host_jobs, torch_error_jobs, torch_use_jobs
from tests.support import jobs as engine_jobs
from tests.support import torch_jobs as jobs
from tests.support.engine_configs import ds_config
from tests.support.oracle import Setting, blocks
from tests.support.theory import RULES
from tests.support.worlds import Processes

S = RULES["mt-dao-adam-n2"]
SIZES = {"plain": "auto", "ddp": 2, "fsdp": "auto", "zero-2": 2}
LATE = Setting(**vars(RULES["des-loc-adam"]) | {"delay": 2})  # its shortest period is 2


def train(world, wrap, s, steps=14, **deslo):
    deslo = {"replica_size": SIZES[wrap]} | deslo
    if wrap == "zero-2":
        return world.run(engine_jobs.run, ds_config(s, 2, deslo=blocks(s, **deslo)["deslo"]), steps)
    return world.run(jobs.run, wrap, blocks(s, **deslo), steps)


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        for state, tensors in one["states"].items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, other["states"][state][name]), (state, name)
        assert one["bytes"] == one["planned"] == other["bytes"]


@pytest.mark.parametrize("wrap", SIZES)
@pytest.mark.parametrize(
    "s, deslo",
    [
        (S, {}),
        (S, {"overlap_comm": False}),
        (S, {"wire_dtype": "float64"}),
        (S, {"synchronous_steps": 4}),
        (LATE, {"sync_delay": 2}),
    ],
    ids=["overlapped", "not overlapped", "float64", "warm-up", "sync_delay 2"],
)
def test_host_memory_changes_no_bit_and_no_byte(four, wrap, s, deslo):
    device, host = (train(four(), wrap, s, **deslo, transport=way) for way in ("device", "host"))
    if wrap == "plain" and "synchronous_steps" in deslo:  # nobody says which backward is the last one
        for result in [*device, *host]:
            result["planned"]["gradients"] = result["bytes"]["gradients"]
    assert_same(device, host)


def test_bfloat16_momenta_land_alike(four):
    config = blocks(S, replica_size=2)
    config["optimizer"]["params"]["state_dtype"] = "bfloat16"
    results = []
    for way in ("device", "host"):
        config["deslo"]["transport"] = way
        results.append(four().run(jobs.run, "ddp", config, 14))
    assert_same(*results)


@pytest.mark.parametrize("wrap", SIZES)
def test_replicas_weighted_by_samples_train_alike(four, wrap):
    s = RULES["des-loc-adam"]
    results = []
    for way in ("device", "host"):
        deslo = {"replica_size": SIZES[wrap], "replica_weights": "samples", "transport": way}
        if wrap == "zero-2":
            results.append(four().run(engine_jobs.weighted, ds_config(s, 2, deslo=deslo), 12))
        else:
            results.append(four().run(torch_use_jobs.weighted, wrap, blocks(s, **deslo), 12, wrap == "plain"))
    assert_same(*results)


def test_buffers_of_the_model_take_the_same_way(four):
    config = {"optimizer": {"params": {"sync_every": {"params": 4}}}, "deslo": {"replica_size": 2}}
    config["deslo"]["transport"] = "host"
    for result in four().run(torch_use_jobs.batch_norm, config, 5):
        assert not result["equal at 4"] and result["equal at 5"]


def test_two_optimizers_average_in_one_order_whatever_the_copies_take(four):
    """Copies to the host end at other times on every rank; both optimizers share one courier."""
    device = four().run(host_jobs.two_optimizers, "device", 13)
    host = four().run(host_jobs.two_optimizers, "host", 13)
    for (expected, _), (params, couriers) in zip(device, host):
        assert couriers == 1 and all(torch.equal(p, q) for p, q in zip(expected, params))


def test_many_averages_at_once_keep_their_order(four):
    for means in four().run(host_jobs.many_at_once, 12, 0):
        assert means == [2.5 * index for index in range(12)]


@pytest.mark.parametrize("fate, limit, step", [("late", 2.0, 5), ("dead", 30.0, 4)])
def test_a_rank_that_is_late_or_dead_is_named(tmp_path, fate, limit, step):
    """As in test_progress.py: rank 1 does not come to the average after step 6, or dies under the one after step 4."""
    world = Processes(3, tmp_path)
    try:
        config = blocks(RULES["des-loc-adam"], timeout_s=limit, transport="host")
        outcomes = world.outcomes(torch_error_jobs.missing, config, fate, 1, step)
    finally:
        world.close()
    for error in outcomes[:1] + outcomes[2:]:
        assert re.search(
            r"AverageError: .*; rank 1 has not come to it \(its last average was after step 4, \d+\.\d s ago\)", error
        )
        assert "rank 0 " not in error and "rank 2 " not in error


def test_a_copy_that_fails_on_one_rank_is_an_error_there_and_names_it_elsewhere(tmp_path):
    world = Processes(3, tmp_path)
    try:
        outcomes = world.outcomes(host_jobs.broken_courier, blocks(RULES["des-loc-adam"]))
    finally:
        world.close()
    assert re.search("AverageError: .*got 'an illegal memory access was encountered'", outcomes[1])
    for error in (outcomes[0], outcomes[2]):
        assert error.startswith("AverageError: ")


@pytest.mark.parametrize("behind", [True, False])
def test_the_meter_tells_what_was_waited_and_nothing_else(four, behind):
    seconds = host_jobs.SECONDS if behind else 0.0
    for result in four().run(host_jobs.waited, blocks(RULES["des-loc-adam"]), 3, behind):
        assert result == {"exposed": seconds, "flown": [{"params": seconds}]}  # of the biases, every 2 steps


def test_host_memory_is_as_planned(four):
    """All states fly at once after step 12; beside them a word for each part of a question and no more."""
    for peak, planned, _ in four().run(host_jobs.held, blocks(S, replica_size=2), 13):
        assert planned <= peak <= planned + 4 * 8


def test_a_script_that_ends_while_an_average_hangs_ends(tmp_path):
    command = [sys.executable, "-m", host_jobs.__name__, f"file://{tmp_path / 'rendezvous'}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    stays = subprocess.Popen([*command, "1"], stdin=subprocess.PIPE, env=environment)
    try:
        leaves = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=240, env=environment)
        assert leaves.stdout.strip() == "done" and leaves.returncode == 0, leaves.stderr
    finally:
        stays.kill()
        stays.wait()


def test_the_banner_says_the_way_and_its_memory():
    def banner(**deslo):
        config = load_config({"optimizer": {}, "deslo": {"replica_size": 2, **deslo}})
        return make_plan(config, [1000], [config.optimizer.periods], contiguous(4, 0, 2), divisor=2).describe()

    assert "travel" not in banner()
    assert "averages travel through host memory and gloo\n" in banner(transport="host")
    assert "up to 12,000 bytes on each rank while averages fly, and 6,000 of the host\n" in banner(transport="host")


@pytest.mark.parametrize("gbit, host", [(1.0, True), (9.9, True), (10.0, False), (400.0, False)])
def test_auto_takes_the_host_below_ten_gbit(monkeypatch, gbit, host):
    class Measured:
        gbit_per_s = type("Median", (), {"median": gbit})

    groups = type("Of", (), {"topology": contiguous(4, 0, 2)})
    deslo = load_config({"optimizer": {}, "deslo": {"transport": "auto"}}).deslo
    monkeypatch.setattr(transport_choice, "probe", lambda *args, **options: Measured)
    way = transport_choice.choose_route(deslo, groups, [torch.empty(1, device="meta")])
    assert way.host == host and f"measured {gbit:.3g} Gbit/s" in way.describe()
    assert not transport_choice.choose_route(deslo, groups, [torch.empty(1)]).host


def test_auto_on_the_cpu_is_said_once_and_measures_nothing(four):
    results = train(four(), "ddp", S, 3, transport="auto")
    for result in results:
        said = 'averages travel from device to device (transport "auto": the tensors are in host memory)'
        assert result["banner"].count(said) == 1


def test_one_replica_travels_nowhere():
    groups = type("Of", (), {"topology": contiguous(2, 0, 2)})
    for way in ("host", "auto"):
        deslo = load_config({"optimizer": {}, "deslo": {"transport": way}}).deslo
        assert transport_choice.choose_route(deslo, groups, []) == Route()
