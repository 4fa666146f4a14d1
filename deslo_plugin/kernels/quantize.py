"""``torch.ops.deslo.{quantize, mean_quantized, dequantize, carry_}``: values in few bits, their mean, what was lost.

A tensor is blocks of ``BLOCK`` elements, the last one filled up with zeros, and each block becomes one record of bytes
by one of the ``FORMATS``: a scale, which is a float32, and a code for each element; bfloat16 has no scale. With x the
elements of a block, of which a is the largest by magnitude, and half-way cases rounded to even:

    int8, int4   s = a / 127 or a / 7      code = round(x / s)            s code
    float8       s = a / 448               code = the nearest e4m3        s code
    bfloat16                               the nearest bfloat16
    rooted       s = sqrt(a) / 255, / 15 or / 448, codes of sqrt(x) without a sign, at least 1 where x > 0    (s code)^2

Rooted formats are for second moments: they hold many decades, and one that is not zero stays above it, since momenta
are divided by its root; what is below zero is taken for zero. A block with NaN or inf has a scale that is NaN, and so
is all that comes of it. One whose scale would be below 2^-100 is zeros.

    quantize(values, bases, errors, records, own, first, format)
        records <- codes of y = values - bases + errors; own <- y itself, of the blocks from ``first`` on
    mean_quantized(received, own, weights, rank, records, format)
        m = sum_j weights[j] y_j, with own for y_rank; records <- codes of m; own <- (m - what they say) / weights[rank]
    dequantize(records, bases, means, format)
        means <- bases + what the records say
    carry_(values, bases, errors, means, sent, own, rank, format)
        errors <- y - what ``sent`` says of it, or own where this rank was the one that took the mean; bases <- means

``values`` are float32, bfloat16 or float16; ``bases``, ``errors``, ``means``, ``own`` and ``weights`` float32; all of
a tensor's shape and contiguous; no bases are zeros, no errors are none and stay so. ``records`` are uint8 (blocks,
bytes of a record), the blocks of one tensor after those of another, and zeros after the last. Bad input raises
``ValueError`` naming the argument.

Here are the schemas and the meaning; the native module adds CPU and CUDA kernels, which give the same records, but for
subnormal numbers, which they take for zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deslo_plugin.kernels.argument_checks import refuse
from deslo_plugin.kernels.availability import define
from deslo_plugin.kernels.quantize_checks import check_buffer, check_lists, check_rank, check_records

BLOCK = 128  # elements with one scale
SCALE = 4  # bytes
TINY = 2.0**-100

_library = torch.library.Library("deslo", "FRAGMENT")


@dataclass(frozen=True)
class Format:
    """How a block becomes a record: ``number`` is what operators call it, ``bits`` those of a code, ``levels`` the
    largest code."""

    number: int
    bits: int
    levels: int
    rooted: bool = False

    @property
    def record_bytes(self) -> int:
        return BLOCK * self.bits // 8 + (0 if self.bits == 16 else SCALE)


FORMATS = {
    "bfloat16": Format(0, 16, 0),
    "float8": Format(1, 8, 448),
    "int8": Format(2, 8, 127),
    "int4": Format(3, 4, 7),
}
ROOTED = {
    "bfloat16": FORMATS["bfloat16"],  # it has the exponents of float32
    "float8": Format(4, 8, 448, rooted=True),
    "int8": Format(5, 8, 255, rooted=True),
    "int4": Format(6, 4, 15, rooted=True),
}
_BY_NUMBER = {each.number: each for each in [*FORMATS.values(), *ROOTED.values()]}
E4M3_LEAST = 1  # the code of the smallest number above zero


def blocks_of(numel: int) -> int:
    return -(-numel // BLOCK)


def _blocks_of_all(tensors: Sequence[Tensor]) -> int:
    return sum(blocks_of(tensor.numel()) for tensor in tensors)


def encode(y: Tensor, format: Format) -> Tensor:
    """Records (blocks, bytes) of ``y`` (blocks, BLOCK), float32."""
    if not len(y):
        return torch.empty(0, format.record_bytes, dtype=torch.uint8, device=y.device)
    if format.bits == 16:
        return y.to(torch.bfloat16).view(torch.uint8)
    # torch's sqrt of float32 is not always the nearest
    x = torch.where(y > 0, y, 0.0).double().sqrt().float() if format.rooted else y
    largest = x.abs().amax(1, keepdim=True)
    levels = torch.full_like(largest, format.levels)  # torch divides by and into a number with two roundings
    scale = largest / levels
    scale = torch.where(scale >= TINY, scale, 0.0)
    inverse = torch.where(scale > 0, levels / largest, 0.0)
    broken = ~torch.isfinite(y).all(1, keepdim=True)
    codes = torch.where(broken, 0.0, x * inverse).clamp(0.0 if format.rooted else -format.levels, format.levels)
    seen = (y > 0) & (scale > 0) & ~broken if format.rooted else None
    scale = torch.where(broken, float("nan"), scale).reshape(-1).view(torch.uint8).view(-1, SCALE)
    return torch.cat([scale, _packed(codes, seen, format)], 1)


def _packed(codes: Tensor, seen: Tensor | None, format: Format) -> Tensor:
    if format.levels == 448:
        small = codes.to(torch.float8_e4m3fn).view(torch.uint8)
        return small if seen is None else torch.where(seen, small.clamp_min(E4M3_LEAST), small)
    whole = codes.round()
    whole = whole if seen is None else torch.where(seen, whole.clamp_min(1), whole)
    if format.bits == 8:
        return whole.to(torch.uint8) if format.rooted else whole.to(torch.int8).view(torch.uint8)
    nibbles = (whole if format.rooted else whole + 8).to(torch.uint8)  # the first of two in the lower half
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def decode(records: Tensor, format: Format) -> Tensor:
    """What ``records`` (blocks, bytes) say: (blocks, BLOCK), float32."""
    if format.bits == 16:
        return _aligned(records).view(torch.bfloat16).float()
    scale, codes = _aligned(records[:, :SCALE]).view(torch.float32), _aligned(records[:, SCALE:])
    if format.levels == 448:
        x = codes.view(torch.float8_e4m3fn).float()
    elif format.bits == 8:
        x = (codes if format.rooted else codes.view(torch.int8)).float()
    else:
        x = torch.stack([codes & 15, codes >> 4], 2).flatten(1).float() - (0 if format.rooted else 8)
    x = x * scale
    return x * x if format.rooted else x


def _aligned(records: Tensor) -> Tensor:
    return records.clone(memory_format=torch.contiguous_format)


def _blocks(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _sent(values: Sequence[Tensor], bases: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
    """y of all of them, (blocks, BLOCK)."""
    of = [_blocks(value) for value in values]
    of = [x - _blocks(base) for x, base in zip(of, bases)] if bases else of
    return torch.cat([x + _blocks(error) for x, error in zip(of, errors)] if errors else of)


def _parts(tensors: Sequence[Tensor], blocks: Tensor) -> Iterator[Tensor]:
    """The elements of each of ``tensors`` among ``blocks``, in its shape."""
    start = 0
    for tensor in tensors:
        end = start + blocks_of(tensor.numel())
        yield blocks[start:end].reshape(-1)[: tensor.numel()].view(tensor.shape)
        start = end


def quantize_reference(
    values: Sequence[Tensor],
    bases: Sequence[Tensor],
    errors: Sequence[Tensor],
    records: Tensor,
    own: Tensor,
    first: int,
    format: int,
) -> None:
    """The operator made of torch's own."""
    of = _format(format)
    check_lists("values", values, bases=bases, errors=errors)
    check_records(records, _blocks_of_all(values), of.record_bytes, "values[0]", values[0])
    fits = own.dim() == 2 and len(own) <= len(records) and own.shape[1] == BLOCK
    check_buffer("own", own, torch.float32, "values[0]", values[0], fits, f"[{len(records)} or fewer, {BLOCK}]")
    if not 0 <= first <= len(records) - len(own):
        refuse(f"first: expected 0 to {len(records) - len(own)}, got {first}")
    y = _sent(values, bases, errors)
    records[: len(y)] = encode(y, of)
    records[len(y) :] = 0
    own.zero_()
    mine = y[first : first + len(own)]
    own[: len(mine)] = mine


def mean_reference(received: Tensor, own: Tensor, weights: Tensor, rank: int, records: Tensor, format: int) -> None:
    """The operator made of torch's own."""
    of = _format(format)
    check_buffer("own", own, torch.float32, "own", own, own.dim() == 2 and own.shape[1] == BLOCK, f"[blocks, {BLOCK}]")
    blocks, replicas = len(own), len(received)
    fits = received.dim() == 3 and received.shape[1:] == (blocks, of.record_bytes)
    check_buffer("received", received, torch.uint8, "own", own, fits, f"[replicas, {blocks}, {of.record_bytes}]")
    check_buffer("weights", weights, torch.float32, "own", own, weights.shape == (replicas,), f"[{replicas}]")
    fits = records.shape == (blocks, of.record_bytes)
    check_buffer("records", records, torch.uint8, "own", own, fits, f"[{blocks}, {of.record_bytes}]")
    check_rank(rank, replicas)
    mean = torch.zeros_like(own)
    for each in range(len(weights)):
        mean += weights[each] * (own if each == rank else decode(received[each], of))
    records.copy_(encode(mean, of))
    rest = (mean - decode(records, of)) / weights[rank]
    own.copy_(torch.where(weights[rank] > 0, rest, 0.0))


def dequantize_reference(records: Tensor, bases: Sequence[Tensor], means: Sequence[Tensor], format: int) -> None:
    """The operator made of torch's own."""
    of = _format(format)
    check_lists("means", means, written=True, bases=bases)
    check_records(records, _blocks_of_all(means), of.record_bytes, "means[0]", means[0])
    for i, said in enumerate(_parts(means, decode(records, of))):
        means[i].copy_(said + bases[i] if bases else said)


def carry_reference(
    values: Sequence[Tensor],
    bases: Sequence[Tensor],
    errors: Sequence[Tensor],
    means: Sequence[Tensor],
    sent: Tensor,
    own: Tensor,
    rank: int,
    format: int,
) -> None:
    """The operator made of torch's own."""
    of = _format(format)
    check_lists("values", values, bases=bases, errors=errors, means=means)
    need = _blocks_of_all(values)
    fits = sent.dim() == 4 and sent.shape[3] == of.record_bytes and sent.shape[:3].numel() >= need
    shape = f"[copies, replicas, blocks, {of.record_bytes}] with {need} blocks or more in all"
    check_buffer("sent", sent, torch.uint8, "values[0]", values[0], fits, shape)
    copies, replicas, part, _ = sent.shape
    fits = own.shape == (copies, part, BLOCK)
    check_buffer("own", own, torch.float32, "values[0]", values[0], fits, f"[{copies}, {part}, {BLOCK}]")
    check_rank(rank, replicas)
    if errors:
        y = _sent(values, bases, errors)
        lost = torch.zeros(sent.shape[:-1].numel(), BLOCK, device=sent.device)
        lost[: len(y)] = y - decode(sent.flatten(0, -2)[: len(y)], of)
        lost.view(*sent.shape[:-1], BLOCK)[:, rank] = own
        for error, rest in zip(errors, _parts(errors, lost)):
            error.copy_(rest)
    for base, mean in zip(bases, means):
        base.copy_(mean)


def _format(number: int) -> Format:
    if number not in _BY_NUMBER:
        refuse(f"format: expected one of {', '.join(map(str, _BY_NUMBER))}, got {number}")
    return _BY_NUMBER[number]


define(
    _library,
    "quantize(Tensor[] values, Tensor[] bases, Tensor[] errors, Tensor(a!) records, Tensor(b!) own, int first, "
    "int format) -> ()",
    quantize_reference,
)
define(
    _library,
    "mean_quantized(Tensor received, Tensor(a!) own, Tensor weights, int rank, Tensor(b!) records, int format) -> ()",
    mean_reference,
)
define(
    _library, "dequantize(Tensor records, Tensor[] bases, Tensor(a!)[] means, int format) -> ()", dequantize_reference
)
define(
    _library,
    "carry_(Tensor[] values, Tensor(a!)[] bases, Tensor(b!)[] errors, Tensor[] means, Tensor sent, Tensor own, "
    "int rank, int format) -> ()",
    carry_reference,
)
