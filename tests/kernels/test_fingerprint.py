"""The fingerprint of tensors: what changes shows, and the same bits give the same number, whoever computes it."""

import pytest
import torch

from deslo_plugin.kernels import fingerprint as kernel
from deslo_plugin.kernels.fingerprint import COLUMNS, fingerprint, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SIZES = [0, 1, 2, 3, 5, 15, 16, 17, 1000, COLUMNS - 1, COLUMNS, COLUMNS + 1, 3 * COLUMNS, 50_001]
LARGE = 5 * COLUMNS + 77


def randn(numel, dtype=torch.float32, seed=0, offset=0):
    """Standard normal numbers, ``offset`` elements into their storage."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(offset + numel, generator=generator, dtype=torch.float64)).to(dtype)[offset:]


def bits(tensor):
    """Its bytes, to be written."""
    return tensor.view(-1).view(torch.uint8)


def changed(tensor, change):
    """Whether ``change(copy)`` shows."""
    copy = tensor.clone()
    change(copy)
    assert not torch.equal(bits(copy), bits(tensor)), "nothing was changed"
    return fingerprint([tensor]).item() != fingerprint([copy]).item()


@pytest.fixture(params=["native", "torch"])
def anywhere(request, kernels, monkeypatch):
    """The kernels, and torch's operators in their place."""
    if request.param == "torch":
        monkeypatch.setattr(torch.ops.deslo, "fingerprint", reference)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_gives_the_same_number(kernels, emulated, dtype, offset):
    tensors = [randn(numel, dtype, seed, offset) for seed, numel in enumerate(SIZES)]
    for each in (tensors, *([tensor] for tensor in tensors)):
        number = torch.ops.deslo.fingerprint(each)
        assert number.dtype == torch.int64 and number.shape == () and number.device == each[0].device
        assert number.item() == emulated.fingerprint(each).item() == reference(each).item()


def test_the_cuda_kernel_takes_more_tensors_than_one_launch_holds(kernels, emulated):
    tensors = [randn(n % 7, seed=n) for n in range(3000)] + [randn(100_003)]
    assert torch.ops.deslo.fingerprint(tensors).item() == emulated.fingerprint(tensors).item()


def test_neither_threads_nor_instruction_set_change_a_bit(everywhere):
    tensors = [randn(1_000_003, offset=1), randn(777, torch.bfloat16), randn(60_001, torch.uint8)]
    assert len({torch.ops.deslo.fingerprint(tensors).item() for _ in everywhere()}) == 1


def test_alignment_is_no_part_of_it(kernels, emulated):
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        tensor = randn(LARGE, dtype)
        for offset in range(5):
            moved = torch.empty(LARGE + offset, dtype=dtype)[offset:].copy_(tensor)
            assert fingerprint([moved]).item() == fingerprint([tensor]).item()
            assert emulated.fingerprint([moved]).item() == fingerprint([tensor]).item()


def test_it_is_that_of_the_elements_in_their_order(anywhere):
    tensor = randn(LARGE * 6).view(6, -1).requires_grad_()
    turned = tensor.t()
    assert fingerprint([turned]).item() == fingerprint([turned.contiguous()]).item() != fingerprint([tensor]).item()
    assert fingerprint([tensor[:, ::2]]).item() == fingerprint([tensor[:, ::2].clone()]).item()
    assert not fingerprint([tensor]).requires_grad


def test_nothing_is_zero(anywhere):
    for tensors in ([torch.empty(0)], [torch.empty(0), torch.empty(3, 0)], [torch.zeros(100)]):
        assert fingerprint(tensors).item() == 0


@pytest.mark.parametrize("dtype", DTYPES[:6])
@pytest.mark.parametrize("numel", [1, 3, 1001, LARGE])
def test_one_bit_shows_wherever_it_is(anywhere, numel, dtype):
    tensor = randn(numel, dtype)
    before, flat = fingerprint([tensor]).item(), bits(tensor)
    generator = torch.Generator().manual_seed(0)
    for at in {0, len(flat) - 1, *torch.randint(len(flat), (24,), generator=generator).tolist()}:
        for bit in (0, 3, 7):
            flat[at] ^= 1 << bit
            assert fingerprint([tensor]).item() != before
            flat[at] ^= 1 << bit
    assert fingerprint([tensor]).item() == before


def test_a_word_may_take_any_value(anywhere):
    tensor = torch.zeros(2 * COLUMNS + 3, dtype=torch.int32)
    values = [0, 1, -1, 2**31 - 1, -(2**31), 2**16, -(2**16)]
    for at in (0, COLUMNS - 1, COLUMNS, 2 * COLUMNS + 2):
        numbers = set()
        for value in values:
            tensor[at] = value
            numbers.add(fingerprint([tensor]).item())
        tensor[at] = 0
        assert len(numbers) == len(values)


def test_swapped_elements_rows_columns_and_blocks_show(anywhere):
    tensor = randn(8 * COLUMNS).view(8, COLUMNS)

    def swap(x, y):
        def swapped(copy):
            copy[x], copy[y] = copy[y].clone(), copy[x].clone()

        return swapped

    pairs = [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((2, 5), (7, 4000)), (0, 1), (3, 7)]
    pairs += [((slice(None), 0), (slice(None), 1)), ((slice(None), slice(0, 64)), (slice(None), slice(64, 128)))]
    for x, y in pairs:
        assert changed(tensor, swap(x, y)), (x, y)
    assert fingerprint([tensor[0], tensor[1]]).item() != fingerprint([tensor[1], tensor[0]]).item()
    assert changed(tensor, lambda copy: copy.copy_(tensor.roll(1, 1)))


@pytest.mark.parametrize("numel", [2, 64, 2 * COLUMNS, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_show(anywhere, dtype, numel):
    for tensor in (randn(numel, dtype), torch.ones(numel, dtype=dtype)):
        assert changed(tensor, lambda copy: copy.neg_())
        assert changed(tensor, lambda copy: copy[: numel // 2].neg_())
        assert changed(tensor, lambda copy: copy[::2].neg_())
        assert numel < 2 * COLUMNS or changed(tensor, lambda copy: copy[:: COLUMNS // 2].neg_())


def test_of_two_signs_in_one_block_none_hides_the_other():
    """Their weights would have to be equal, or to add up to 0."""
    weights = kernel._mixed(torch.arange(1, COLUMNS + 1)) | 1
    assert len(torch.cat([weights, 2**32 - weights]).unique()) == 2 * COLUMNS


def test_changes_in_many_places_show(anywhere):
    tensor = randn(LARGE)
    for change in (
        lambda copy: copy.zero_(),
        lambda copy: copy.mul_(2),
        lambda copy: copy.clamp_(-1, 1),
        lambda copy: copy.add_(1e-3),
        lambda copy: copy[COLUMNS : 2 * COLUMNS].copy_(tensor[:COLUMNS]),
        lambda copy: copy.copy_(tensor.flip(0)),
    ):
        assert changed(tensor, change)


def test_random_changes_never_meet(kernels):
    """Of 4,000 fingerprints of a few flipped signs, no two are equal."""
    generator = torch.Generator().manual_seed(1)
    tensor, numbers = torch.ones(3 * COLUMNS), set()
    for _ in range(4000):
        flipped = torch.randint(len(tensor), (4,), generator=generator).unique()
        tensor[flipped] = -1
        numbers.add(fingerprint([tensor]).item())
        tensor[flipped] = 1
    assert len(numbers) == 4000


def test_bad_input_names_the_argument(kernels):
    bad = {
        "tensors: expected one tensor or more, got an empty list": [],
        r"tensors\[1\]: expected a contiguous tensor": [torch.zeros(3), torch.zeros(8)[::2]],
    }
    for message, tensors in bad.items():
        for compute in (torch.ops.deslo.fingerprint, reference):
            if tensors or compute is reference:  # the dispatcher finds no kernel for an empty list
                with pytest.raises(ValueError, match=f"^deslo: {message}"):
                    compute(tensors)
    with pytest.raises(ValueError, match=r"tensors\[1\]: expected the device of tensors\[0\]"):
        reference([torch.zeros(3), torch.zeros(3, device="meta")])


def test_it_has_a_shape_without_data():
    with torch._subclasses.FakeTensorMode():
        number = torch.ops.deslo.fingerprint([torch.empty(5), torch.empty(7)])
    assert number.shape == () and number.dtype == torch.int64
