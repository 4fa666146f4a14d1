"""``deslo::quantize``, ``mean_quantized``, ``dequantize`` and ``carry_``: every kernel gives the reference's bits. What
the reference gives is the question of test_records.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deslo_plugin.kernels import quantize as reference
from deslo_plugin.kernels.quantize import BLOCK, FORMATS, ROOTED, blocks_of, decode, encode
from tests.support.vectors import randn

SIZES = [0, 1, 127, 128, 129, 1000]
VALUES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = {each.number: each for each in [*FORMATS.values(), *ROOTED.values()]}
ALL = pytest.mark.parametrize("format", NUMBERS.values(), ids=str)
ODD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30, -1e-36, 3e38, 1.0]


class References:
    """The operators made of torch's own, under the names of the native ones."""

    quantize, dequantize, carry_ = (
        staticmethod(getattr(reference, f"{name}_reference")) for name in ("quantize", "dequantize", "carry")
    )
    mean_quantized = staticmethod(reference.mean_reference)


def bits(tensor):
    """Equal for equal bits, and for any two NaN."""
    return torch.where(tensor.isnan(), float("nan"), tensor).view(torch.int32)


def said(records, format):
    """The same of records: bfloat16 has NaN of its own."""
    return bits(decode(records.flatten(0, -2), format)) if format.bits == 16 else records


def assert_all_equal(results):
    for each in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(each, results[0], strict=True))


class Case:
    """Tensors of one call, with numbers of all magnitudes and some that are odd; ``offset`` elements into storage."""

    def __init__(self, format, sizes, dtypes, *, bases=True, errors=True, seed=0, offset=0, odd=()):
        self.format = format
        self.values = [self._numbers(n, kind, seed + i, offset) for i, (n, kind) in enumerate(zip(sizes, dtypes))]
        float32 = lambda first: [self._numbers(n, torch.float32, first + i, offset) for i, n in enumerate(sizes)]
        self.bases, self.errors = float32(seed + 100) if bases else [], float32(seed + 200) if errors else []
        self.means = float32(seed + 300)
        for i, at, value in odd:
            if len(self.values[i]):
                self.values[i][at % len(self.values[i])] = value
        self.need = sum(map(blocks_of, sizes))
        self.replicas, self.rank = 3, 1
        self.part = -(-self.need // (2 * self.replicas)) + 1
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randn(6 * self.part, BLOCK, generator=generator)
        self.sent = encode(blocks, format).view(2, self.replicas, self.part, -1)
        self.own = torch.randn(2, self.part, BLOCK, generator=generator)
        self.weights = torch.tensor([0.2, 0.5, 0.3])

    def _numbers(self, n, dtype, seed, offset):
        scale = 10.0 ** torch.randint(-3, 4, (), generator=torch.Generator().manual_seed(seed)).item()
        numbers = scale * randn(offset + n, torch.float32, seed) ** 3
        return (numbers.abs() if self.format.rooted and seed % 3 else numbers).to(dtype)[offset:]

    def quantize(self, operators, first=0, own_rows=0):
        """(records, own) among others that were there before; the records behind the tensors' are zeros."""
        records = torch.full((6 * self.part, self.format.record_bytes), 77, dtype=torch.uint8)
        own = torch.full((own_rows, BLOCK), 7.0)
        operators.quantize(self.values, self.bases, self.errors, records, own, first, self.format.number)
        assert not records[self.need :].any()
        return said(records, self.format), bits(own)

    def mean(self, operators, weights=None):
        records, own = torch.empty_like(self.sent[0, 0]), self.own[0].clone()
        weights = self.weights if weights is None else weights
        operators.mean_quantized(self.sent[0], own, weights, self.rank, records, self.format.number)
        return said(records, self.format), bits(own)

    def dequantize(self, operators):
        means = [torch.full_like(mean, 7.0) for mean in self.means]
        operators.dequantize(self.sent.flatten(0, 2), self.bases, means, self.format.number)
        return [bits(mean) for mean in means]

    def carry(self, operators, with_means=True):
        bases, errors = ([each.clone() for each in tensors] for tensors in (self.bases, self.errors))
        means = self.means if with_means else []
        operators.carry_(self.values, bases, errors, means, self.sent, self.own, self.rank, self.format.number)
        return [bits(each) for each in bases + errors]

    def all_of(self, operators, first=0, own_rows=0):
        results = [*self.quantize(operators, first, own_rows), *self.mean(operators), *self.dequantize(operators)]
        return [*results, *self.carry(operators), *self.carry(operators, with_means=False)]


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=5))
    dtypes = draw(st.lists(st.sampled_from(VALUES), min_size=len(sizes), max_size=len(sizes)))
    odd = st.tuples(st.integers(0, len(sizes) - 1), st.integers(0, 999), st.sampled_from(ODD))
    case = Case(
        draw(st.sampled_from(list(NUMBERS.values()))),
        sizes,
        dtypes,
        bases=draw(st.booleans()),
        errors=draw(st.booleans()),
        seed=draw(st.integers(0, 20)),
        offset=draw(st.integers(0, 3)),
        odd=draw(st.lists(odd, max_size=4)),
    )
    own_rows = draw(st.integers(0, 6 * case.part))
    return case, draw(st.integers(0, 6 * case.part - own_rows)), own_rows


@settings(max_examples=200, deadline=None)
@given(given=cases())
def test_every_kernel_gives_the_references_bits(kernels, emulated, given):
    case, first, own_rows = given
    assert_all_equal([case.all_of(each, first, own_rows) for each in (References, torch.ops.deslo, emulated)])


@ALL
def test_neither_threads_nor_instruction_set_change_a_bit(everywhere, format):
    case = Case(format, [*SIZES, 200_003], [*VALUES, *VALUES, torch.float32])
    assert_all_equal([case.all_of(References), *(case.all_of(torch.ops.deslo) for _ in everywhere())])


def test_the_cuda_kernels_take_more_tensors_than_one_launch_holds(emulated):
    case = Case(FORMATS["int8"], [1 + n % 300 for n in range(1500)], [torch.float32] * 1500)
    results = [case.all_of(each, first=1490, own_rows=40) for each in (References, emulated)]
    assert_all_equal(results)


@ALL
def test_records_and_own_may_lie_anywhere(kernels, emulated, format):
    case, results = Case(format, [1000], [torch.float32]), []
    for operators in (References, torch.ops.deslo, emulated):
        for shift in (0, 1, 2, 3):
            storage = torch.zeros(shift + case.need * format.record_bytes, dtype=torch.uint8)
            records = storage[shift:].view(case.need, -1)
            own = torch.zeros(shift + case.need * BLOCK)[shift:].view(case.need, BLOCK)
            operators.quantize(case.values, case.bases, case.errors, records, own, 0, format.number)
            means = [torch.empty(1000)]
            operators.dequantize(records, [], means, format.number)
            results.append([said(records, format), bits(own), bits(means[0])])
    assert_all_equal(results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@ALL
def test_a_broken_value_is_seen_all_over_its_block(kernels, emulated, format, value):
    for operators in (References, torch.ops.deslo, emulated):
        for at in (0, 77, 127):
            values, records = [torch.rand(300)], torch.empty(3, format.record_bytes, dtype=torch.uint8)
            values[0][128 + at] = value
            operators.quantize(values, [], [], records, torch.empty(0, BLOCK), 0, format.number)
            means = [torch.empty(300)]
            operators.dequantize(records, [], means, format.number)
            finite = means[0].isfinite()
            assert finite[:128].all() and finite[256:].all() and not finite[128 + at]
            if format.bits < 16:
                assert means[0][128:256].isnan().all()
            mean, own = torch.empty_like(records), torch.ones(3, BLOCK)
            operators.mean_quantized(
                records[None].repeat(2, 1, 1), own, torch.tensor([0.5, 0.5]), 1, mean, format.number
            )
            operators.dequantize(mean, [], means, format.number)
            assert not means[0][128 + at].isfinite() and not own[1, at].isfinite() and own[::2].isfinite().all()


def test_e4m3_is_rounded_as_torch_does_on_either_side_of_every_half_way(kernels, emulated):
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (exact[1:] + exact[:-1]) / 2
    far = torch.tensor(1e9)
    y = torch.cat([each for x in (exact, halves) for each in (x, x.nextafter(-far), x.nextafter(far).clamp_max(448))])
    y = torch.cat([y, -y]).repeat(2)
    y = y[: len(y) // BLOCK * BLOCK].view(-1, BLOCK).clone()
    y[:, 0] = 448  # a scale of 1
    for operators in (torch.ops.deslo, emulated):
        records = torch.empty(len(y), 132, dtype=torch.uint8)
        operators.quantize([y], [], [], records, y[:0], 0, FORMATS["float8"].number)
        assert torch.equal(records[:, 4:], y.to(torch.float8_e4m3fn).view(torch.uint8))


@ALL
def test_a_replica_that_counts_nothing_carries_nothing(kernels, emulated, format):
    case, weights = Case(format, [1000], [torch.float32]), torch.tensor([0.5, 0.0, 0.5])
    results = [case.mean(each, weights) for each in (References, torch.ops.deslo, emulated)]
    assert_all_equal(results)
    assert not results[0][1].any()


def test_tensors_may_be_empty(kernels, emulated):
    for operators in (References, torch.ops.deslo, emulated):
        records = torch.ones(2, 132, dtype=torch.uint8)
        own = torch.ones(2, BLOCK)
        operators.quantize([torch.empty(0)], [], [], records, own, 0, 2)
        assert not records.any() and not own.any()
        operators.dequantize(records[:0], [], [torch.empty(0, 3)], 2)
        operators.mean_quantized(records[None, :0], own[:0], torch.ones(1), 0, records[:0], 2)
        operators.carry_([torch.empty(0)], [], [torch.empty(0)], [], records.view(1, 2, 1, 132), own[None, :1], 0, 2)


def test_torch_accepts_the_operators(kernels):
    case = Case(FORMATS["int8"], [10, 0, 300], [torch.bfloat16] * 3)
    records, own = torch.zeros(6, 132, dtype=torch.uint8), torch.zeros(2, BLOCK)
    operators, check = torch.ops.deslo, torch.library.opcheck
    check(operators.quantize, (case.values, case.bases, case.errors, records, own, 1, 2))
    check(operators.mean_quantized, (case.sent[0], case.own[0], case.weights, 1, torch.empty_like(case.sent[0, 0]), 2))
    check(operators.dequantize, (records, case.bases, case.means, 2))
    check(operators.carry_, (case.values, case.bases, case.errors, case.means, case.sent, case.own, 1, 2))


A, B, HALF, TWO = torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).bfloat16(), torch.zeros(2, BLOCK)
ODDLY = torch.zeros(8)[::2]


def records(*sizes):
    return torch.zeros(sizes, dtype=torch.uint8)


BAD = [
    ("quantize", "format: expected one of 0, 1, 2, 3, 4, 5, 6, got 7", ([A], [], [], records(2, 132), TWO, 0, 7)),
    ("quantize", "values: expected one tensor or more, got an", ([], [], [], records(2, 132), TWO, 0, 2)),
    ("quantize", r"values\[0\]: expected float32, bfloat16 or", ([A.double()], [], [], records(2, 132), TWO, 0, 2)),
    ("quantize", r"values\[0\]: expected a contiguous", ([ODDLY], [], [], records(2, 132), TWO, 0, 2)),
    ("quantize", "bases: expected 1 tensors or none, got 2", ([A], [A, A], [], records(2, 132), TWO, 0, 2)),
    ("quantize", r"errors\[0\]: expected float32, got", ([A], [A], [HALF], records(2, 132), TWO, 0, 2)),
    (
        "quantize",
        r"errors\[0\]: expected shape \[4\] of values\[0\], got \[2, 2\]",
        ([A], [], [B], records(2, 132), TWO, 0, 2),
    ),
    (
        "quantize",
        r"records: expected uint8 of shape \[2 or more, 132\], got shape \[1, 132\]",
        ([A, A], [], [], records(1, 132), TWO[:0], 0, 2),
    ),
    (
        "quantize",
        r"records: .*, 68\], got another dtype of shape \[2, 68\]",
        ([A], [], [], TWO[:, :68].clone(), TWO, 0, 3),
    ),
    ("quantize", r"own: .* \[1 or fewer, 128\], got shape \[2, 128\]", ([A], [], [], records(1, 132), TWO, 0, 2)),
    ("quantize", "first: expected 0 to 1, got 2", ([A], [], [], records(3, 132), TWO, 2, 2)),
    ("mean_quantized", r"own: .* \[blocks, 128\]", (records(1, 2, 132), A, A, 0, records(2, 132), 2)),
    ("mean_quantized", r"received: .* \[replicas, 2, 132\]", (records(2, 132), TWO, A, 0, records(2, 132), 2)),
    ("mean_quantized", r"weights: .* \[1\], got", (records(1, 2, 132), TWO, A, 0, records(2, 132), 2)),
    ("mean_quantized", r"records: .* \[2, 132\], got", (records(4, 2, 132), TWO, A, 0, records(3, 132), 2)),
    ("mean_quantized", "rank: expected one of 4 replicas", (records(4, 2, 132), TWO, A, 4, records(2, 132), 2)),
    ("dequantize", "means: expected one tensor or more", (records(2, 132), [], [], 2)),
    ("dequantize", r"means\[0\]: expected float32, got", (records(2, 132), [], [HALF], 2)),
    ("dequantize", r"bases\[0\]: expected shape \[4\] of means\[0\]", (records(2, 132), [B], [A], 2)),
    ("dequantize", r"records: .* \[1 or more, 132\], got", (records(2, 68), [], [A], 2)),
    (
        "carry_",
        r"sent: .* \[copies, replicas, blocks, 132\] with 2 blocks or more in all, got",
        ([A, A], [], [], [], records(1, 1, 1, 132), TWO[None, :1], 0, 2),
    ),
    ("carry_", r"own: .* \[1, 1, 128\], got shape \[2, 128\]", ([A], [], [], [], records(1, 2, 1, 132), TWO, 0, 2)),
    ("carry_", "rank: expected one of 2", ([A], [], [], [], records(1, 2, 1, 132), TWO[None, :1], -1, 2)),
    ("carry_", "means: expected 1 tensors", ([A], [], [], [A, A], records(1, 2, 1, 132), TWO[None, :1], 0, 2)),
]


@pytest.mark.parametrize(("name", "message", "arguments"), BAD, ids=[f"{name} {words[:40]}" for name, words, _ in BAD])
def test_bad_input_names_the_argument(kernels, name, message, arguments):
    texts = []
    for operators in (torch.ops.deslo, References):
        with pytest.raises(ValueError, match=f"^deslo: {message}") as error:
            getattr(operators, name)(*arguments)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
