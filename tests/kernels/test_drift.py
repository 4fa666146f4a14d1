"""The drift of a state from its mean: the sums of every kernel, and what reaches the meter of a training replica."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deslo_plugin import DesLoc, NonFiniteError
from deslo_plugin.averaging.synchronizer import Synchronizer
from deslo_plugin.comm.transport import SingleReplica
from deslo_plugin.kernels import drift
from deslo_plugin.kernels.drift import Drift, drift_of, measure
from tests.support.vectors import SIZES, randn
from tests.support.worlds import threads

LOCAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIRE = [torch.float32, torch.float64]
BOUND = 1e-12  # of the sums, relative to the sums of absolute terms


def tensors(sizes, local=torch.float32, mean=torch.float32, offset=0):
    x = [randn(n, local, i, offset) for i, n in enumerate(sizes)]
    return x, [randn(n, mean, 50 + i, offset) for i, n in enumerate(sizes)]


def assert_sums(got, local, mean):
    l, m = (torch.cat([t.double().reshape(-1) for t in each]) for each in (local, mean))
    terms = (l - m).square(), l * m, m.square()
    assert got.dtype == torch.float64 and got.shape == (3,)
    for mine, term in zip(got.tolist(), terms):
        assert abs(mine - math.fsum(term.tolist())) <= BOUND * math.fsum(term.abs().tolist())


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=5))
    types = draw(
        st.lists(st.tuples(st.sampled_from(LOCAL), st.sampled_from(WIRE)), min_size=len(sizes), max_size=len(sizes))
    )
    offset, seed = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    return tuple(
        [randn(n, kind[k], seed + 50 * k + i, offset) for i, (n, kind) in enumerate(zip(sizes, types))] for k in (0, 1)
    )


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_the_sums_are_those_of_float64(kernels, emulated, case):
    for compute in (torch.ops.deslo.drift, emulated.drift, drift.reference):
        assert_sums(compute(*case), *case)


def test_a_large_tensor(kernels, emulated):
    local, mean = randn(10_000_019, torch.float32, 0), randn(10_000_019, torch.float32, 1)
    l, m = local.double(), mean.double()
    expected = torch.stack([(l - m).square().sum(), l @ m, m @ m])
    for compute in (torch.ops.deslo.drift, emulated.drift, drift.reference):
        torch.testing.assert_close(compute([local], [mean]), expected, rtol=1e-12, atol=1e-6)


def test_the_cuda_kernel_takes_more_tensors_than_one_launch_holds(emulated):
    case = tensors([1 + n % 7 for n in range(2000)])
    assert_sums(emulated.drift(*case), *case)


@pytest.mark.parametrize(("local", "mean"), [(l, m) for l in LOCAL for m in WIRE])
def test_neither_threads_nor_instruction_set_change_a_bit(everywhere, local, mean):
    case = tensors([*SIZES, 300_001], local, mean)
    results = [torch.ops.deslo.drift(*case) for _ in everywhere()]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mean", WIRE)
def test_a_broken_mean_is_seen_wherever_it_is(kernels, emulated, mean, value):
    for sizes, at in (([1], (0, 0)), ([5000, 70], (0, 4999)), ([5000, 70], (1, 69)), ([100_003], (0, 50_000))):
        local, averaged = tensors(sizes, mean=mean)
        for own in (local, averaged):  # a replica that brought other values, or the same ones
            averaged[at[0]][at[1]] = value
            for compute in (torch.ops.deslo.drift, emulated.drift, drift.reference):
                sums = compute(own, averaged)
                assert not sums[0].isfinite() and not sums[2].isfinite()
                assert not math.isfinite(drift_of(sums.tolist()).distance)


def test_subnormal_numbers_are_nothing(kernels):
    assert torch.ops.deslo.drift([torch.full((100,), 1e-40)], [torch.full((100,), 2e-40)]).tolist() == [0, 0, 0]


def test_distance_and_cosine():
    def of(x, m):
        return drift_of(measure([torch.tensor(x)], [torch.tensor(m)]).tolist())

    assert of([1.0, 2.0], [1.0, 2.0]) == of([0.0], [0.0]) == Drift(0.0, 1.0)
    assert of([3.0, 4.0], [4.0, 3.0]) == Drift(pytest.approx(math.sqrt(2) / 5), pytest.approx(24 / 25))
    assert of([-2.0], [2.0]) == Drift(2.0, -1.0)
    assert of([0.0], [2.0]) == Drift(1.0, 0.0)
    assert of([1.0], [0.0]) == Drift(math.inf, 0.0)


def test_a_state_in_another_order_of_dimensions_is_compared_by_index():
    x = randn(120, torch.float32, 0).view(2, 3, 4, 5)
    assert drift_of(measure([x.contiguous(memory_format=torch.channels_last)], [x]).tolist()) == Drift(0.0, 1.0)


def test_torch_accepts_the_operator(kernels):
    torch.library.opcheck(torch.ops.deslo.drift, tensors([10, 0, 70], torch.bfloat16))


A, B = torch.zeros(4), torch.zeros(2, 2)
BAD = {
    "local: expected one tensor or more, got an empty list": ([], []),
    "mean: expected 2 tensors, got 1": ([A, A], [A]),
    r"mean\[1\]: expected shape \[4\] of local\[1\], got \[2, 2\]": ([A, A], [A, B]),
    r"mean\[0\]: expected float32 or float64, got bfloat16": ([A], [A.bfloat16()]),
    r"local\[0\]: expected float32, float64, bfloat16 or float16, got another dtype": ([A.int()], [A]),
    r"local\[1\]: expected a contiguous tensor": ([A, B.t()[:1]], [A, B[:1]]),
    r"mean\[0\]: expected a contiguous tensor": ([A], [torch.zeros(8)[::2]]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(kernels, message):
    for compute in (torch.ops.deslo.drift, drift.reference):
        with pytest.raises(ValueError, match=f"^deslo: {message}"):
            compute(*BAD[message])


EVERY_STEP = {"params": 1, "exp_avg": 1, "exp_avg_sq": 1}


def optimizer_of(*weights, transport, sync_every, on_average=None, **deslo):
    settings = {
        "optimizer": {"params": {"lr": 1e-2, "sync_every": sync_every}},
        "deslo": {"average_at": "after_step", **deslo},
    }
    return DesLoc(
        [torch.nn.Parameter(weight) for weight in weights], settings, transport=transport, on_average=on_average
    )


def drifts(average, steps=1):
    """What the events of ``steps`` steps without updates say, two parameters starting at 1 + 2 rank; and the
    optimizer."""
    weights = (torch.full((5, 3), 1.0 + 2 * average.rank), torch.full((7,), 1.0 + 2 * average.rank))
    found = []
    optimizer = optimizer_of(
        *weights, transport=average, sync_every={"params": 1}, on_average=lambda event: found.append(event.drift)
    )
    for _ in range(steps):
        optimizer.skip_step()
    return found, optimizer


def test_replicas_that_hold_1_and_3_are_half_their_mean_away_from_it():
    for found, optimizer in threads(2, drifts):
        assert found == [{"params": Drift(0.5, pytest.approx(1.0))}] and optimizer.stats.drift == found[0]
        assert all((weight == 2).all() for weight in optimizer.param_groups[0]["params"])


def test_the_meter_keeps_the_latest_drift():
    for found, optimizer in threads(2, lambda average: drifts(average, steps=2)):
        assert found[1] == optimizer.stats.drift == {"params": Drift(0.0, 1.0)}


def test_a_single_replica_does_not_drift():
    weights = torch.nn.Parameter(torch.randn(7))
    optimizer = DesLoc([weights], lr=1e-2, sync_every={"params": 1, "exp_avg": 2, "exp_avg_sq": 3})
    for _ in range(8):
        weights.grad = torch.randn(7)
        optimizer.step()
    assert optimizer.stats.drift == dict.fromkeys(EVERY_STEP, Drift(0.0, 1.0))


def test_finite_means_whose_squares_overflow_are_no_error():
    def replica(average):
        weights = torch.full((3,), 1e200 * (1 + 2 * average.rank), dtype=torch.float64)
        optimizer = optimizer_of(weights, transport=average, sync_every={"params": 1}, wire_dtype="float64")
        optimizer.skip_step()
        return weights.tolist()

    assert threads(2, replica) == [[2e200] * 3] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_state_is_named_and_nothing_is_written(value):
    def replica(average):
        weights = [torch.full((3,), 1.0 + average.rank), torch.full((3,), 1.0 + average.rank)]
        optimizer = optimizer_of(*weights, transport=average, sync_every=EVERY_STEP)
        if average.rank == 1:
            optimizer.state[optimizer.param_groups[0]["params"][1]]["exp_avg"][2] = value
        with pytest.raises(
            NonFiniteError, match=r"average of exp_avg after step 1: .* from rank\(s\) \[1\]; nothing was"
        ):
            optimizer.skip_step()
        return [weight[0].item() for weight in weights], optimizer.stats.drift

    assert threads(2, replica) == [([1.0, 1.0], {}), ([2.0, 2.0], {})]


def test_a_broken_mean_that_lands_later_is_seen_at_once():
    good, broken = torch.ones(3), torch.tensor([math.nan])
    sync = Synchronizer(SingleReplica(), wire_dtype=torch.float32, bucket_bytes=1 << 20, on_average=lambda event: None)
    flight = sync.start(1, "params", [good, broken], [good, broken])
    with pytest.raises(NonFiniteError, match="average of params"):
        sync.land(1, {"params": [(flight, 0)]}, {"params": [good]})
