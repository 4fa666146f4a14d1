"""Arguments of the update operators for tests, and how near results must be."""

import copy as copying

import torch

from deslo_plugin.kernels import update as ops
from tests.support.device import DEVICE

HALF = [torch.bfloat16, torch.float16]
SIZES = [0, 1, 3, 63, 64, 65, 127, 1000, 4097]
# Largest difference from the reference, relative to max(1, |value|): the reference fuses some multiply-adds and takes
# u + (1 - beta)(g - u) for beta u + (1 - beta) g. A 16-bit result may fall on the other side of a rounding.
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FLOAT32 = (torch.float32, torch.float32, torch.float32, None)
TYPES = [
    FLOAT32,
    (torch.bfloat16, torch.bfloat16, torch.float32, None),
    (torch.float16, torch.float32, torch.float32, None),
] * 3
MIXED = [(n,) for n in [*SIZES, 300_001]]
BRIEF = [(x, g, torch.bfloat16, None) for x in (torch.float32, *HALF) for g in (torch.float32, *HALF)] + [TYPES[-1]]


def randn(shape, dtype, generator, offset=0):
    """Standard normal numbers, ``offset`` elements into their storage: unaligned if that is odd."""
    storage = torch.randn(offset + shape.numel(), generator=generator, dtype=torch.float64).to(dtype)
    return storage[offset:].view(shape)


def like(tensor, device=None):
    """A copy on ``device`` that lies in its storage as ``tensor`` does: offset and strides."""
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    flat = flat.to(device or tensor.device, copy=True)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Case:
    """Arguments of one call, the same numbers on every device. ``types``: (x, g, state, copy or None) of each
    tensor."""

    def __init__(self, rule, momenta, shapes, types, *, t=5, seed=0, offset=0, device=DEVICE, **options):
        generator = torch.Generator().manual_seed(seed)
        shapes = [torch.Size(shape) for shape in shapes]
        make = lambda index: [randn(s, k[index], generator, offset) for s, k in zip(shapes, types)]
        self.rule, self.momenta = rule, momenta
        self.x, self.g = make(0), make(1)
        self.u = [tensor for _ in range(momenta) for tensor in make(2)]
        self.v = [] if rule == "sgdm" else [[tensor.square() for tensor in make(2)]]
        self.copy = make(3) if types[0][3] else []
        betas = [1 - 0.5 / (j + 1) ** 2 for j in range(momenta)]
        self.numbers = {
            "t": t,
            "lr": 0.01,
            "weight_decay": 0.1,
            "betas": betas,
            "weights": [0.9 / momenta] * momenta,
        } | options
        if rule != "sgdm":
            self.numbers |= {"beta2": 0.97, "eps": 1e-6}
        if rule == "adam":
            self.numbers.setdefault("bias_correction", True)
        self.move(device)

    def move(self, device):
        """Puts the arguments on ``device``, where they lie in memory as before."""
        there = lambda tensors: [like(tensor, device) for tensor in tensors]
        self.x, self.g, self.u, self.copy = map(there, (self.x, self.g, self.u, self.copy))
        self.v = [there(tensors) for tensors in self.v]
        moved = {name: number.to(device) for name, number in self.numbers.items() if isinstance(number, torch.Tensor)}
        self.numbers = self.numbers | moved

    def on(self, device):
        """The same case on another device."""
        other = copying.copy(self)
        other.move(device)
        return other

    def run(self, update):
        """x, u, v and copy after ``update`` of copies that lie in memory as these do."""
        clone = lambda tensors: [like(tensor) for tensor in tensors]
        x, u, copy = clone(self.x), clone(self.u), clone(self.copy)
        v = [clone(tensors) for tensors in self.v]
        update(x, self.g, u, *v, copy, **self.numbers)
        return [*x, *u, *(tensor for tensors in v for tensor in tensors), *copy]

    def native(self):
        return self.run(getattr(torch.ops.deslo, f"{self.rule}_"))

    def reference(self):
        return self.run(ops.reference(self.rule))


def assert_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = mine.cpu(), other.cpu()
        assert mine.dtype == other.dtype and mine.shape == other.shape
        error = (mine.double() - other.double()).abs() / other.double().abs().clamp(min=1.0)
        assert not error.isnan().any() and (error <= BOUND[mine.dtype]).all(), f"{mine.dtype}: {error.max():.3g}"


def assert_same_bits(ours, theirs):
    assert all(torch.equal(mine.cpu(), other.cpu()) for mine, other in zip(ours, theirs, strict=True))
