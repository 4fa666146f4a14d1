"""Wrong input to a DeepSpeed job: found before the first step, named, on every rank, never a hang."""

import copy

import pytest

from tests.support import engine_error_jobs
from tests.support.engine_configs import ds_config
from tests.support.theory import RULES
from tests.support.worlds import Processes

GOOD = ds_config(RULES["des-loc-adam"], 2)


def changed(path: str, value) -> dict:
    ds = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    at = ds
    for key in parents:
        at = at.setdefault(key, {})
    at[last] = value
    return ds


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("deslo.replica_sise", 2, "deslo.replica_sise: expected a known key"),
        (
            "deslo.replica_size",
            3,
            "deslo.replica_size: expected a divisor of the world size 4, got 3; use one of 1, 2, 4",
        ),
        ("deslo.replica_size", "auto", "expected a number of ranks when all ranks are on one node"),
        ("optimizer.params.sync_evry", {}, "did you mean 'sync_every'?"),
        ("optimizer.params.lr", -1, "optimizer.params.lr: expected a number >= 0, got -1"),
        ("optimizer.params.betas", [0.9, 0.95], "expected either betas or momenta/second_moment, got both"),
        ("optimizer.type", "Desloc", "did you mean 'DesLoc'?"),
        ("optimizer.type", "AdamW", 'expected "optimizer": {"type": "DesLoc", ...} beside it'),
        ("desloc", {"replica_size": 2}, "did you mean 'deslo'?"),
        (
            "zero_optimization.zero_hpz_partition_size",
            4,
            "expected a divisor of deslo.replica_size 2: ranks that keep a",
        ),
        ("zero_optimization.zero_quantized_gradients", True, "its all-to-all spans replicas"),
        ("zero_optimization.offload_optimizer", {"device": "nvme"}, "NVMe swapping is not supported yet"),
        (
            "tensor_parallel",
            {"autotp_size": 4},
            "autotp_size: expected a divisor of deslo.replica_size 2: ranks that share",
        ),
        ("tensor_parallel", {"tp": {"tp_size": 2}}, "set autotp_size: DeepSpeed cuts nothing by tp_size"),
        ("sequence_parallel_size", 4, "sequence_parallel_size: expected a divisor of deslo.replica_size 2: ranks that"),
        ("sequence_parallel_size", 2, "expected 1, as without groups, got 2; give "),
        ("deslo.on_nonfinite", "skipp", "did you mean 'skip'?"),
    ],
)
def test_a_config_that_cannot_work_is_refused_on_every_rank(four, path, value, message):
    for error in four().run(engine_error_jobs.raises, changed(path, value)):
        assert error.startswith("ConfigError: "), error
        assert message in error


def test_fp16_without_zero_is_refused_with_the_reason(four):
    ds = ds_config(RULES["des-loc-adam"], 0, fp16={"enabled": True})
    for error in four().run(engine_error_jobs.raises, ds):
        assert "never applied" in error


def test_skip_needs_deepspeeds_own_check_in_bf16(four):
    ds = ds_config(
        RULES["des-loc-adam"], 2, bf16={"enabled": True, "check_grad_overflow": False}, deslo={"on_nonfinite": "skip"}
    )
    for error in four().run(engine_error_jobs.raises, ds):
        assert "check_grad_overflow" in error


def test_configs_that_differ_between_ranks_are_named(four):
    for key, value in (("optimizer.params.lr", 0.5), ("deslo.average_at", "after_step"), ("gradient_clipping", 9.0)):
        each = [GOOD, GOOD, GOOD, changed(key, value)]
        for error in four().run(engine_error_jobs.raises, each):
            assert f"the DeepSpeed config's {key}: expected" in error
            assert f"got {value} on rank(s) [3]" in error


def test_a_mistake_on_one_rank_alone_reaches_all_ranks(four):
    for key, value in (("optimizer.params.sync_evry", 3), ("deslo.replica_size", 3), ("optimizer.type", "Desloc")):
        for error in four().run(engine_error_jobs.raises, [GOOD, GOOD, changed(key, value), GOOD]):
            assert f"the DeepSpeed config's {key}: expected" in error and f"got {value} on rank(s) [2]" in error


def test_param_groups_that_differ_between_ranks_are_named(four):
    for error in four().run(engine_error_jobs.groups_that_differ, GOOD):
        assert "optimizer param group 0.sync_every: expected" in error and "on rank(s) [1]" in error


def test_seeds_that_differ_between_ranks_are_named(four):
    for error in four().run(engine_error_jobs.raises, changed("deslo.initial_params", "check"), 0, [7, 7, 8, 7]):
        assert "initial value of parameter 0.weight" in error
        assert "rank(s) [2]; seed every rank alike" in error


def test_broadcast_starts_every_replica_from_the_first(four):
    ds = changed("deslo.initial_params", "broadcast")
    assert four().run(engine_error_jobs.raises, ds, 2, [1, 2, 3, 4]) == ["no error"] * 4


def test_model_shapes_that_differ_between_ranks_are_named(four):
    for error in four().run(engine_error_jobs.raise_with_hidden, GOOD, [3, 3, 3, 4]):
        assert "model parameter 2.weight: expected (3, 8) torch.float32 on every rank" in error
        assert "got (4, 8) torch.float32 on rank(s) [3]" in error


STOCK = {"optimizer": {"type": "AdamW", "params": {}}}
EVERY = {"params": 4, "exp_avg": 8, "exp_avg_sq": 8}


@pytest.mark.parametrize(
    ("deslo", "message"),
    [
        ({"sync_delay": 2}, "deslo.sync_delay: expected 1 with a stock optimizer, got 2"),
        ({"fragments": 64}, "deslo.fragments: expected at most 8, the longest period, got 64"),
    ],
)
def test_a_schedule_of_a_stock_optimizer_is_refused_as_without_deepspeed(four, deslo, message):
    ds = ds_config(RULES["des-loc-adam"], 2) | STOCK
    ds["deslo"] |= {"sync_every": EVERY, **deslo}
    for error in four().run(engine_error_jobs.raises, ds):
        assert message in error


def test_auto_fragments_are_a_number_whoever_made_the_optimizer(four):
    assert four().run(engine_error_jobs.fragments_read, EVERY) == [(4, 4)] * 4


def test_an_optimizer_given_twice_is_refused(four):
    for error in four().run(engine_error_jobs.given_twice, GOOD):
        assert "expected one optimizer, got two" in error


def test_a_foreign_mpu_is_refused(four):
    for error in four().run(engine_error_jobs.foreign_mpu, GOOD):
        assert "initialize(mpu=...): expected one with sequence parallelism alone" in error and "got Unit" in error


@pytest.mark.parametrize("how", ["mesh", "mpu"])
def test_groups_of_sequences_that_span_replicas_are_refused(four, how):
    for error in four().run(engine_error_jobs.sequences_across_replicas, GOOD, how):
        assert "groups of consecutive ranks inside a replica of 2 ranks, got ranks [0, 1, 2, 3]; let seq" in error, (
            error
        )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("with sequences", "tensor_parallel.autotp_size: expected it alone inside a replica, got 2 beside mesh_param="),
        ("built in parts", "parameter 0.weight: expected a model that is built whole, which AutoTP cuts"),
        ("three in one", "parameter 0.weight: expected a matrix cut into one block of rows or columns for each rank"),
        ("Muon", "optimizer.params.rule muon: expected whole matrices on each rank, got matrices that tensor_parallel"),
    ],
)
def test_matrices_that_cannot_be_cut_are_refused(four, mistake, message):
    for error in four().run(engine_error_jobs.cut_wrongly, GOOD, mistake):
        assert message in error, error


def test_nan_in_one_replica_stops_every_rank_before_it_spreads(four):
    ds = ds_config(RULES["des-loc-adam"], 0)
    results = four().run(engine_error_jobs.average_refused, ds, 12, (1, 4))
    assert len({message for message, _ in results}) == 1
    assert "NonFiniteError: average of params" in results[0][0] and "rank(s) [2, 3]" in results[0][0]
    assert [finite for _, finite in results] == [True, True, False, False]


def test_nan_that_bf16_zero_does_not_look_for_stops_every_rank(four):
    ds = ds_config(RULES["des-loc-adam"], 2, bf16={"enabled": True, "check_grad_overflow": False})
    results = four().run(engine_error_jobs.average_refused, ds, 12, (0, 4))
    assert all("NonFiniteError" in message for message, _ in results)
    assert [finite for _, finite in results] == [False, False, True, True]


@pytest.mark.parametrize(
    ("overlap", "fate", "last"),
    [(True, "late", "its last average was after step 2"), (False, "dead", "no average yet")],
)
def test_an_average_that_a_rank_misses_names_this_rank(tmp_path, overlap, fate, last):
    world = Processes(4, tmp_path)
    try:
        ds = ds_config(RULES["des-loc-adam"], 0, deslo={"timeout_s": 4, "overlap_comm": overlap, "replica_size": 1})
        errors = world.outcomes(engine_error_jobs.missed_average, ds, fate)
        for error in errors[:3]:
            assert error.startswith(
                "AverageError: average over replicas: expected ranks [0, 1, 2, 3] to answer within 4 s"
            )
            assert f"; rank 3 has not come to it ({last}" in error and "rank 2 " not in error
    finally:
        world.close()
