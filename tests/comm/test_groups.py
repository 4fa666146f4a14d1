"""What one device hides from a CPU, asked of real processes: whose step is called, which groups there are."""

import pytest
import torch

from tests.support import gpu_fault_jobs as jobs
from tests.support import waiting_jobs
from tests.support.engine_configs import ds_config, stock_ds
from tests.support.oracle import blocks
from tests.support.theory import RULES, assert_oracle, oracle_states
from tests.support.worlds import Processes

S = RULES["mt-dao-adam-n2"]


@pytest.mark.parametrize("way", ["wrapper", "prepare"])
@pytest.mark.parametrize("kind", ["AdamW", "fused AdamW", "DesLoc"])
def test_every_step_that_accelerate_takes_beside_a_grad_scaler_is_seen(four, kind, way):
    for result in four().run(jobs.scaled_by_accelerate, kind, way):
        assert result["steps"] == 4 and result["moved"] == [True] * 4
        assert result["equal after"] == [False, True, False, True]
        assert result["events"] == {"params": 2, "exp_avg": 2, "exp_avg_sq": 2}


@pytest.mark.parametrize("kind", ["AdamW", "fused AdamW", "DesLoc"])
def test_a_step_that_overflows_in_one_replica_still_counts_and_averages(four, kind):
    results = four().run(jobs.scaled_by_accelerate, kind, "wrapper", 2)
    for rank, result in enumerate(results):
        assert result["steps"] == 4 and result["finite"] and result["skipped"] == (rank == 1)
        assert result["moved"] == [True, True, rank != 1, True]
        assert result["equal after"] == [False, True, False, True]


def test_what_a_wrapper_has_kept_is_renewed_or_refused(four):
    """Attached is what is in the wrapper, of which attach knows nothing: DesLoc's step is its own."""
    assert all(result["steps"] == 4 for result in four().run(jobs.scaled_by_accelerate, "DesLoc", "inside"))
    for kind in ("AdamW", "fused AdamW"):
        for error in four().outcomes(jobs.scaled_by_accelerate, kind, "inside"):
            assert "ConfigError: AdamW.step: expected the step that attach has installed" in error


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Four ranks that will be in unequally many process groups to their end."""
    world = Processes(4, tmp_path_factory.mktemp("uneven"))
    yield world
    world.close()


OTHERS = pytest.mark.parametrize(
    "members, local", [([0], False), ([0, 1], False), ([0], True)], ids=["rank 0", "ranks 0 and 1", "rank 0 by itself"]
)


@OTHERS
@pytest.mark.parametrize("wrap", ["plain", "ddp", "deepspeed"])
def test_ranks_in_unequally_many_process_groups_attach_and_train_as_the_oracle(uneven, wrap, members, local):
    timeout_s = 40.0 + 2 * members[-1] + local + 4 * len(wrap)  # a topology's groups are made once: these are new
    more = {"timeout_s": timeout_s, "replica_size": 2 if wrap != "plain" else 1}
    config = ds_config(S, 2, deslo=more) if wrap == "deepspeed" else blocks(S, **more)
    results = uneven.run(jobs.beside_other_groups, members, local, wrap, config, 8, timeout=300)
    assert_oracle(results, oracle_states(S, 8, replicas=4 if wrap == "plain" else 2))


def test_a_subset_whose_ranks_are_in_unequally_many_groups_is_refused_everywhere(four, uneven):
    assert four().run(jobs.attach_a_subset, 77.0, timeout=300) == ["attached"] * 2 + [""] * 2
    said = uneven.run(jobs.attach_a_subset, 77.0, [0], timeout=300)
    assert said[2:] == ["", ""]
    for message in said[:2]:
        assert (
            "ConfigError: attach(process_group=...): expected ranks that are in equally many process groups" in message
        )


def test_a_subset_of_a_world_that_is_bound_to_a_device_is_refused_everywhere(four):
    said = four().run(jobs.attach_a_subset, 78.0, None, True, timeout=300)
    assert said[2:] == ["", ""]
    for message in said[:2]:
        assert "ConfigError: attach(process_group=...)" in message and "leave device_id out" in message


@pytest.mark.parametrize("which, name", [("world", "all ranks"), ("shard", "a replica"), ("replica", "averages")])
def test_a_group_that_cannot_be_reached_is_named(four, which, name):
    ranks = {"world": [[0, 1, 2, 3]] * 4, "shard": [[0, 1]] * 2 + [[2, 3]] * 2, "replica": [[0, 2], [1, 3]] * 2}
    for rank, message in enumerate(four().run(jobs.unreachable, which)):
        assert f"attach's process group of {name}: expected ranks {ranks[which][rank]} to reach" in message
        assert "got 'Connection refused by 10.0.0.7'" in message and "NCCL_SOCKET_IFNAME" in message


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3, 1e16], [1.0, INF, 2.0, 3.0], [INF, -INF, 0.0, 0.0], [NAN, 1, 2, 3]])
@pytest.mark.parametrize("flags", [[False] * 4, [False, False, True, False], [True] * 4])
def test_what_a_replica_decides_takes_one_collective_and_is_the_same_everywhere(four, flags, values):
    for result in four().run(jobs.small_collectives, flags, values):
        assert result == {"any": any(flags), "total": float(sum(values)).hex(), "calls": (1, 1)}


@pytest.mark.parametrize("divisor", [1, 2])
def test_parts_that_ranks_average_for_each_other_come_back_in_their_places(four, divisor):
    for got, expected in four().run(jobs.divided_average, divisor):
        assert got == expected


@pytest.mark.parametrize("stock", [False, True], ids=["DesLoc", "stock"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_waits_for_no_average_that_travels(four, stage, stock):
    ds = of_engine(stage, stock)
    for result in four().run(waiting_jobs.waits_of_an_engine, ds, 8, stock):
        assert result["in the air"] == [] and result["launched"] > 4
        assert result["synchronized"] is False


@pytest.mark.parametrize("stage, persistent", [(0, None), (2, None), (3, 0), (3, 10**5)])
def test_an_engine_waits_for_no_average_that_travels_for_two_steps_or_says_so(four, stage, persistent):
    """ZeRO-3 ends each step with a wait for the parameters that it keeps whole, which falls into the flight."""
    zero = {} if persistent is None else {"stage3_param_persistence_threshold": persistent}
    results = four().run(waiting_jobs.waits_of_an_engine, of_engine(stage, False, zero, sync_delay=2), 10, False)
    for result in results:
        assert result["launched"] > 4 and bool(result["in the air"]) == bool(persistent)
        assert all("allgather_params" in place for place in result["in the air"])
    assert any("stage3_param_persistence_threshold" in line for line in results[0]["said"]) == bool(persistent)


def of_engine(stage, stock, zero=None, **deslo):
    ds = stock_ds(stage) if stock else ds_config(S, stage)
    ds["deslo"] |= deslo
    ds["zero_optimization"] = {"stage": stage, "overlap_comm": False} | (zero or {})
    return ds


def test_timers_of_engines_without_overlap_and_of_others_are_left_alone(four):
    for result in four().run(waiting_jobs.waits_of_an_engine, of_engine(2, False, overlap_comm=False), 4, False):
        assert result["synchronized"] is True and result["in the air"] == []
    assert four().run(waiting_jobs.plain_engine_beside, of_engine(2, False)) == [(False, True)] * 4


@pytest.mark.parametrize("stage, warns", [(1, True), (2, True), (3, False)])
def test_a_setting_of_zero_that_waits_in_each_backward_is_said(four, stage, warns):
    results = four().run(waiting_jobs.waits_of_an_engine, of_engine(stage, False, {"overlap_comm": True}), 3, False)
    assert any("zero_optimization.overlap_comm waits" in line for line in results[0]["said"]) == warns


def test_a_rank_that_is_late_is_named_while_it_is_waited_for_and_training_goes_on(four):
    config = blocks(S, replica_size=1)
    results = four().run(waiting_jobs.late_rank, config, 2, 5, 8, 5.0)
    for rank, (said, _) in enumerate(results):
        named = [line for line in said if "in an average; rank 2 has not come to it" in line]
        assert bool(named) == (rank != 2), said
        assert all(f"rank {rank} has waited" in line and "rank 1 has not" not in line for line in named)
    assert_oracle([{"states": states} for _, states in results], of_params(oracle_states(S, 8, replicas=4)))


def of_params(theory):
    return [{"params": states["params"]} for states in theory]


@pytest.mark.parametrize("how", ["head outside", "blocks without their root"])
def test_gradients_beside_fsdp_are_the_mean_of_all_in_the_warm_up(four, how):
    results = four().run(jobs.sharded_in_part, how, blocks(S, synchronous_steps=4), 3)
    params = None
    for result in results:
        assert torch.equal(result["params"], results[0]["params"])
    for step in range(1):
        expected = jobs.gradients_of_all(params, step)
        for result in results:
            assert (result["gradients"][step] - expected).abs().max() < 1e-6


def test_a_tensor_goes_where_a_group_without_a_cpu_reaches_it(monkeypatch):
    from deslo_plugin.comm import process_groups

    for config, where in (("cpu:gloo,cuda:nccl", "cpu"), ("meta:nccl", "meta")):
        monkeypatch.setattr(process_groups.dist, "get_backend_config", lambda group, config=config: config)
        assert process_groups.reachable(torch.ones(2), None).device.type == where
