"""``deslo::land_``: every kernel against float64, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deslo_plugin.kernels import delayed_update as landing
from tests.support.vectors import SIZES, randn

# largest error, relative to the size of x, local and mean: one rounding of x, and of float32 arithmetic
BOUND = {torch.float64: 1e-15, torch.float32: 4e-7, torch.bfloat16: 2**-8 + 4e-7, torch.float16: 2**-11 + 4e-7}
TYPES = [
    (x, mean) for x in BOUND for mean in (torch.float32, torch.float64) if (x, mean) != (torch.float64, torch.float32)
]


def tensors(sizes, types, seed=0, offset=0):
    """(x, local, mean), with local near x as an average some steps old is."""
    types = [types] * len(sizes) if isinstance(types, tuple) else types
    x = [randn(n, kind, seed + i, offset) for i, (n, (kind, _)) in enumerate(zip(sizes, types))]
    local = [p.to(kind) + 0.1 * randn(p.numel(), kind, seed + 20 + i) for i, (p, (_, kind)) in enumerate(zip(x, types))]
    return x, local, [randn(n, kind, seed + 50 + i, offset) for i, (n, (_, kind)) in enumerate(zip(sizes, types))]


def landed(compute, x, local, mean, factor):
    """x after ``compute`` on copies that lie in memory as ``x`` does."""
    copies = [
        torch.empty(0, dtype=p.dtype)
        .set_(p.untyped_storage().clone())
        .as_strided(p.shape, p.stride(), p.storage_offset())
        for p in x
    ]
    compute(copies, local, mean, factor)
    return copies


def assert_landed(got, x, local, mean, factor):
    for ours, p, l, m in zip(got, x, local, mean, strict=True):
        exact = p.double() + factor * (m.double() - l.double())
        size = p.double().abs() + m.double().abs() + l.double().abs() + 1e-3
        assert ours.dtype == p.dtype and ((ours.double() - exact).abs() <= BOUND[p.dtype] * size).all()


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=5))
    types = draw(st.lists(st.sampled_from(TYPES), min_size=len(sizes), max_size=len(sizes)))
    case = tensors(sizes, types, seed=draw(st.integers(0, 9)), offset=draw(st.integers(0, 3)))
    return *case, draw(st.sampled_from([0.0, 0.5, 0.9**7, 1.0]))


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_every_kernel_lands_the_mean(kernels, emulated, case):
    results = [landed(compute, *case) for compute in (torch.ops.deslo.land_, emulated.land_, landing.reference)]
    for result in results:
        assert_landed(result, *case)
    for native, cuda, reference in zip(*results, strict=True):
        assert torch.equal(native, cuda) and torch.equal(native, reference)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_neither_threads_nor_instruction_set_change_a_bit(everywhere, types):
    case = (*tensors([*SIZES, 300_001], types), 0.3)
    results = [torch.cat(landed(torch.ops.deslo.land_, *case)) for _ in everywhere()]
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_cuda_kernel_takes_more_tensors_than_one_launch_holds(emulated):
    case = (*tensors([1 + n % 7 for n in range(2000)], TYPES[0]), 0.5)
    assert_landed(landed(emulated.land_, *case), *case)


def test_a_state_in_another_order_of_dimensions_lands_by_index():
    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    local, mean = torch.zeros(2, 3, 4, 5), torch.arange(120.0).view(2, 3, 4, 5)
    landing.land_([x], [local], [mean], 1.0)
    assert torch.equal(x, mean) and x.is_contiguous(memory_format=torch.channels_last)


def test_a_state_that_has_not_moved_takes_the_mean_to_one_rounding():
    x, local, mean = tensors([1000], (torch.float32, torch.float32))
    landing.land_(x, [x[0].clone()], mean, 1.0)
    assert ((x[0] - mean[0]).abs() <= 2**-22 * (mean[0].abs() + 5)).all()


def test_torch_accepts_the_operator(kernels):
    torch.library.opcheck(torch.ops.deslo.land_, (*tensors([10, 0, 70], (torch.bfloat16, torch.float32)), 0.5))


def test_backward_notices_that_params_have_landed():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    with torch.no_grad():
        landing.land_([p], [torch.ones(3)], [torch.zeros(3)], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def tensor(dtype=torch.float32, shape=(4,)):
    return torch.zeros(shape, dtype=dtype)


ONE = tensor()
BAD = {
    "x: expected one tensor or more, got an empty list": ([], [], []),
    "local: expected 1 tensors, got 2": ([tensor()], [tensor(), tensor()], [tensor()]),
    "mean: expected 1 tensors, got 0": ([tensor()], [tensor()], []),
    r"mean\[0\]: expected shape \[4\] of x\[0\], got \[2, 2\]": ([tensor()], [tensor()], [tensor(shape=(2, 2))]),
    r"mean\[0\]: expected float32 or float64, got bfloat16": ([tensor()], [tensor()], [tensor(torch.bfloat16)]),
    r"local\[0\]: expected float64 as mean\[0\] is, got float32": ([tensor()], [tensor()], [tensor(torch.float64)]),
    r"x\[0\]: expected float32, bfloat16 or float16 with a float32 mean": (
        [tensor(torch.float64)],
        [tensor()],
        [tensor()],
    ),
    r"x\[0\]: expected float32, .* got another dtype": ([tensor(torch.int32)], [tensor()], [tensor()]),
    r"x\[0\]: expected a contiguous tensor": ([torch.zeros(8)[::2]], [tensor()], [tensor()]),
    r"(x|mean)\[0\]: expected memory of its own, but it overlaps (mean|x)\[0\]": ([ONE], [tensor()], [ONE]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(kernels, message):
    for compute in (torch.ops.deslo.land_, landing.reference):
        with pytest.raises(ValueError, match=f"^deslo: {message}"):
            compute(*BAD[message], 0.5)
