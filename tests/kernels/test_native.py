"""The native kernels against the Python reference, on every path: dtypes, sizes, layouts, instruction sets, threads,
CUDA."""

import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deslo_plugin.kernels import update as ops
from tests.support.cases import BRIEF, FLOAT32, HALF, MIXED, SIZES, TYPES, Case, assert_close, assert_same_bits
from tests.support.device import cpu_only

ROOT = Path(__file__).resolve().parents[2]
SINGLE = st.tuples(
    st.sampled_from([torch.float32, *HALF]),
    st.sampled_from([torch.float32, *HALF]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(HALF),
)
DOUBLE = st.just((torch.float64,) * 4)


@st.composite
def cases(draw):
    count, copied = draw(st.integers(1, 5)), draw(st.booleans())
    types = [
        kind if copied else (*kind[:3], None)
        for kind in draw(st.lists(SINGLE | DOUBLE, min_size=count, max_size=count))
    ]
    shapes = draw(
        st.lists(st.sampled_from(SIZES).map(lambda n: (n,)) | st.just((3, 5, 7)), min_size=count, max_size=count)
    )
    rule = draw(st.sampled_from(list(ops.OPERATORS)))
    options = {"clip_value": draw(st.none() | st.just(0.3)), "weight_decay": draw(st.sampled_from([0.0, 0.1]))}
    if rule == "adam":
        options["bias_correction"] = draw(st.booleans())
    if draw(st.booleans()):
        options["grad_scale"] = torch.tensor(0.125)
    return Case(
        rule,
        draw(st.integers(1, 6)),
        shapes,
        types,
        t=draw(st.sampled_from([0, 1, 1000])),
        seed=draw(st.integers(0, 99)),
        offset=draw(st.integers(0, 3)),
        **options,
    )


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_the_kernels_compute_the_reference(kernels, case):
    assert_close(case.native(), case.reference())


@pytest.mark.parametrize("momenta", [1, 2, 3, 4, 5, ops.MAX_MOMENTA])
@pytest.mark.parametrize("rule", ops.OPERATORS)
def test_every_rule_and_number_of_momenta(kernels, rule, momenta):
    case = Case(rule, momenta, [(n,) for n in SIZES], [FLOAT32] * len(SIZES))
    assert_close(case.native(), case.reference())


@pytest.mark.parametrize("rule", ops.OPERATORS)
def test_a_large_tensor(kernels, rule):
    case = Case(rule, 2, [(10_000_019,)], [FLOAT32])
    assert_close(case.native(), case.reference())


def test_a_permuted_layout_is_updated_in_place(kernels):
    case = Case("adam", 2, [(2, 3, 4, 5)], [FLOAT32])
    permute = lambda tensors: [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    plain = case.native()
    case.x, case.g, case.u, case.v = permute(case.x), permute(case.g), permute(case.u), [permute(case.v[0])]
    assert_same_bits(case.native(), plain)


TYPES += [(torch.float64,) * 3 + (None,)]
of_states = pytest.mark.parametrize("types", [TYPES, BRIEF], ids=["float32", "bfloat16"])


@of_states
@pytest.mark.parametrize("momenta", [1, 3, 7])
@pytest.mark.parametrize("rule", ops.OPERATORS)
def test_the_number_of_threads_changes_no_bit(kernels, rule, momenta, types):
    case, before = Case(rule, momenta, MIXED, types), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.native())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@of_states
@pytest.mark.parametrize("momenta", [1, 3, 7])
@pytest.mark.parametrize("rule", ops.OPERATORS)
def test_the_instruction_set_changes_no_bit(everywhere, rule, momenta, types):
    case = Case(rule, momenta, MIXED, types, clip_value=0.7)
    expected = case.native()
    for _ in everywhere(counts=[1]):
        assert_same_bits(case.native(), expected)


@of_states
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("momenta", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rule", ops.OPERATORS)
def test_the_cuda_kernels_give_the_bits_of_the_cpu(emulated, rule, momenta, offset, types):
    copied = [(*kind[:3], kind[0]) for kind in types]
    for options in ({}, {"clip_value": 0.7, "grad_scale": torch.tensor(0.3)}, {"t": 0}):
        case = Case(rule, momenta, MIXED, copied, offset=offset, **options)
        assert_same_bits(case.run(getattr(emulated, f"{rule}_")), case.on("cpu").native())


def test_the_cuda_kernels_take_more_tensors_than_one_launch_holds(emulated):
    case = Case("adam", 2, [(1 + n % 7,) for n in range(1000)], [FLOAT32] * 1000)
    assert_same_bits(case.run(emulated.adam_), case.on("cpu").native())


@cpu_only("sanitizers of the host's compiler")
def test_address_and_undefined_behaviour_sanitizers_find_nothing(kernels, tmp_path):
    built, sources = tmp_path / "sanitized", [ROOT / "tests/emulation/sanitized.cpp", *ROOT.glob("csrc/cpu/*.cpp")]
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-g",
            "-w",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            "-ffp-contract=off",
            "-fopenmp-simd",
            "-DDESLO_ISA=baseline",
            f"-I{ROOT}/tests/emulation",
            *sources,
            "-o",
            built,
        ],
        check=True,
    )
    subprocess.run([built], check=True, timeout=900)


def test_found_inf_leaves_everything_as_it_was(kernels):
    case = Case("adam", 2, [(100,)], [FLOAT32], found_inf=torch.tensor(1.0))
    assert_same_bits(case.native(), [*case.x, *case.u, *case.v[0]])
    assert_same_bits(case.reference(), [*case.x, *case.u, *case.v[0]])


def test_broken_gradients_stay_visible(kernels):
    for clip_value in (None, 0.5):
        case = Case("adam", 1, [(3,)], [FLOAT32], clip_value=clip_value)
        case.g = [torch.tensor([float("nan"), float("inf"), 1.0])]
        for result in (case.native(), case.reference()):
            assert all(tensor.isfinite().tolist() == [False, False, True] for tensor in result)


def test_subnormal_momenta_fade_to_zero(kernels):
    case = Case("sgdm", 1, [(100,)], [FLOAT32])
    case.u, case.g = [torch.full((100,), 1e-40)], [torch.zeros(100)]
    assert (case.native()[1] == 0).all()


def spoil(**changes):
    """A way to make a good case bad: attribute -> function of its value."""

    def apply(case):
        for name, change in changes.items():
            setattr(case, name, change(getattr(case, name)))

    return apply


def put(value, index=0):
    return lambda tensors: [*tensors[:index], value, *tensors[index + 1 :]]


def number(**changes):
    return spoil(numbers=lambda numbers: numbers | changes)


def overlap(case):
    case.u[0] = case.x[0]


def overlap_across(case):
    case.x = list(torch.zeros(7).as_strided((2, 4), (3, 1)))
    case.g, case.u, case.v = [torch.zeros(4)] * 2, [torch.zeros(4), torch.zeros(4)], [[torch.zeros(4), torch.zeros(4)]]


BAD = {
    "x: expected one tensor or more": spoil(x=lambda x: [], g=lambda g: []),
    "g: expected 2 tensors, got 1": spoil(g=lambda g: g[:1]),
    "u: expected 2 tensors, got 3": spoil(u=lambda u: [*u, torch.zeros(4)]),
    "v: expected 2 tensors, got 1": spoil(v=lambda v: [v[0][:1]]),
    "copy: expected 2 tensors, got 1": spoil(copy=lambda copy: [torch.zeros(4)]),
    r"g\[1\]: expected shape \[4\] of x\[1\], got \[2, 2\]": spoil(g=put(torch.zeros(2, 2), 1)),
    r"u\[0\]: expected shape \[4\]": spoil(u=put(torch.zeros(5))),
    r"x\[0\]: expected a contiguous": spoil(x=put(torch.zeros(8)[::2])),
    r"g\[0\]: expected a contiguous": spoil(g=put(torch.zeros(1).expand(4))),
    r"g\[0\]: expected float32, bfloat16 or float16 with float32 momenta, got float64": spoil(
        g=put(torch.zeros(4).double())
    ),
    r"x\[0\]: expected float64 with float64 momenta": spoil(u=put(torch.zeros(4).double())),
    r"u\[1\]: expected float32, float64 or bfloat16, got float16; squares": spoil(u=put(torch.zeros(4).half(), 1)),
    r"x\[0\]: expected .* with bfloat16 momenta, got float64": spoil(
        x=put(torch.zeros(4).double()), u=put(torch.zeros(4).bfloat16())
    ),
    r"v\[0\]: expected float32 as u\[0\] is, got bfloat16": spoil(v=lambda v: [put(torch.zeros(4).bfloat16())(v[0])]),
    r"g\[0\]: expected float32, .*got": spoil(g=put(torch.zeros(4, dtype=torch.int32))),
    r"(u\[0\]|x\[0\]): expected memory of its own, but it overlaps (u\[0\]|x\[0\])": overlap,
    r"x\[1\]: expected memory of its own, but it overlaps x\[0\]": overlap_across,
    "betas: expected 1 to 16 momenta, got 17": number(betas=[0.9] * 17),
    "betas: expected 1 to 16 momenta, got 0": number(betas=[]),
    "weights: expected 1 as there are betas, got 2": number(weights=[0.5, 0.5]),
    "clip_value: expected a number > 0, got -1": number(clip_value=-1.0),
    "grad_scale: expected one float32 number": number(grad_scale=torch.zeros(2)),
    "found_inf: expected one float32 number": number(found_inf=torch.zeros((), dtype=torch.float64)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(kernels, message):
    case = Case("adam", 1, [(4,), (4,)], [FLOAT32] * 2)
    BAD[message](case)
    before = [tensor.clone() for tensor in [*case.x, *case.u, *case.v[0]]]
    for update in (torch.ops.deslo.adam_, ops.reference("adam")):
        with pytest.raises(ValueError, match=f"^deslo: {message}"):
            update(case.x, case.g, case.u, *case.v, case.copy, **case.numbers)
        assert_same_bits([*case.x, *case.u, *case.v[0]], before)


def test_an_instruction_set_that_is_not_there_is_refused(kernels):
    with pytest.raises(ValueError, match="isa: expected one that this machine has, got 'mmx'"):
        kernels.isa("mmx")
