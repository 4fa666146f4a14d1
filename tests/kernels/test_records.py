"""Records of few bits: how near they are to what they say, what they hold exactly, and that nothing is lost on the way
of an average, all against float64."""

import pytest
import torch

from deslo_plugin.kernels.quantize import BLOCK, FORMATS, ROOTED, TINY, decode, encode

PLAIN = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
OF_SQUARES = pytest.mark.parametrize("format", list(ROOTED.values())[1:], ids=list(ROOTED)[1:])
E4M3 = sorted(
    {m * 2.0**-9 for m in range(8)} | {(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)} - {480.0}
)


def numbers(decades=1.0, seed=0):
    """(200, BLOCK), each block of a magnitude of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, BLOCK, generator=generator) * 10 ** (decades * torch.randn(200, BLOCK, generator=generator))
    return x * 10 ** torch.linspace(-15, 15, 200)[:, None]


def half_quantum(y, format):
    """How far a record may be from y, float64, but for float32 arithmetic."""
    largest = y.abs().amax(1, keepdim=True)
    if format.bits == 16:
        return y.abs() * 2.0**-8
    if format.levels == 448:  # 3 bits behind the leading one, and steps of 2^-9 of the scale below
        return torch.maximum(y.abs() * 2.0**-4, largest / 448 * 2.0**-10)
    return largest / format.levels / 2


@PLAIN
def test_a_record_is_within_half_a_quantum(format):
    y = numbers()
    lost = (decode(encode(y, format), format).double() - y.double()).abs()
    assert (lost <= half_quantum(y.double(), format) + 1e-6 * y.double().abs().amax(1, keepdim=True)).all()


@OF_SQUARES
def test_so_is_the_root_of_one_that_is_rooted_and_nothing_becomes_zero(format):
    y = numbers(decades=3).abs()
    y[:, ::17] = 0
    back = decode(encode(y, format), format).double()
    root = y.double().sqrt()
    largest = root.amax(1, keepdim=True)
    least = largest / format.levels * (2.0**-9 if format.levels == 448 else 1)  # what is above zero says at least this
    lost = (back.sqrt() - root).abs()
    assert (lost <= torch.maximum(half_quantum(root, format), least) + 1e-6 * largest).all()
    assert torch.equal(back > 0, y > 0)
    assert (encode(-y, format) == 0).all(), "what is below zero is taken for zero"


def test_what_is_representable_comes_back():
    exact = {
        "int8": torch.arange(-127.0, 128),
        "int4": torch.arange(-7.0, 8),
        "float8": torch.tensor([*E4M3, *(-x for x in E4M3)]),
        "bfloat16": torch.randn(256).bfloat16().float(),
    }
    for name, format in FORMATS.items():
        for power in (-20, 0, 20):
            y = torch.zeros(3 * BLOCK)
            y[: len(exact[name])] = exact[name]
            y[::BLOCK] = exact[name].max()  # so that each block has the scale 2^power
            y = y.view(3, BLOCK) * 2.0**power
            assert torch.equal(decode(encode(y, format), format), y)
            if name != "bfloat16":
                rooted = ROOTED[name]
                root = torch.tensor(E4M3) if name == "float8" else torch.arange(rooted.levels + 1.0)
                y[:] = 0
                y.view(-1)[: len(root)] = root
                y[:, 0] = root.max()
                y = (y * 2.0**power).square()
                assert torch.equal(decode(encode(y, rooted), rooted), y)


@pytest.mark.parametrize("format", [*FORMATS.values(), *ROOTED.values()], ids=str)
def test_zeros_and_what_is_next_to_nothing(format):
    assert not decode(encode(torch.zeros(2, BLOCK), format), format).any()
    assert not decode(torch.zeros(2, format.record_bytes, dtype=torch.uint8), format).any()
    y = torch.full((1, BLOCK), TINY / 2)
    y[0, 3] = 0
    back = decode(encode(y, format), format)
    if format.rooted or format.bits == 16:
        assert torch.equal(back > 0, y > 0)
    else:
        assert not back.any()


@PLAIN
def test_what_a_mean_lacks_is_what_the_replicas_keep(kernels, format):
    """One average of three replicas that count differently: the mean that landed, and the mean of their errors."""
    operators, sizes, weights = torch.ops.deslo, [300, 5, 1000], torch.tensor([0.2, 0.5, 0.3])
    replicas, part = 3, 5  # 12 blocks
    draw = lambda seed: [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)) for n in sizes]
    bases, values, errors = draw(1), [draw(10 * m) for m in (1, 2, 3)], [draw(100 * m) for m in (1, 2, 3)]
    whole = lambda tensors: torch.cat(tensors).double()
    wanted = sum(w * (whole(v) + 0.1 * whole(e)) for w, v, e in zip(weights.double(), values, errors))
    errors = [[0.1 * each for each in tensors] for tensors in errors]
    sent, own = torch.empty(3, 3, part, format.record_bytes, dtype=torch.uint8), torch.empty(3, part, BLOCK)
    for m in range(replicas):
        operators.quantize(values[m], bases, errors[m], sent[m].flatten(0, 1), own[m], m * part, format.number)
    gathered = torch.empty_like(sent[0])
    for m in range(replicas):
        operators.mean_quantized(sent[:, m].contiguous(), own[m], weights, m, gathered[m], format.number)
    means = [torch.empty(n) for n in sizes]
    operators.dequantize(gathered.flatten(0, 1), bases, means, format.number)
    for m in range(replicas):
        common = [base.clone() for base in bases]
        operators.carry_(values[m], common, errors[m], means, sent[m][None], own[m][None], m, format.number)
        assert all(torch.equal(base, mean) for base, mean in zip(common, means))
    kept = sum(w * whole(e) for w, e in zip(weights.double(), errors))
    torch.testing.assert_close(whole(means) + kept, wanted, rtol=0, atol=5e-6)
    assert (whole(means) - wanted).abs().max() > 1e-4
