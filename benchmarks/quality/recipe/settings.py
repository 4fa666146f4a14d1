"""On what the recipe is tried: sizes, batches, numbers of replicas, data, lengths."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.simulation.small_gpt import GPTConfig, Text, of_library, small_gpt
from deslo_plugin.simulation import Network

CLASSES, INPUTS, WIDTH = 10, 32, 64


@dataclass(frozen=True)
class Setting:
    """``replicas`` of ``sequences`` windows each; ``rates`` are the grid of every method; the last fifth is the decay.

    ``shards``: each replica reads a part of the text of its own. ``teacher``: no text, but the classes that a random
    network gives to random points, a tenth of them wrong.
    """

    rates: tuple[float, ...] = (1.25e-3, 2.5e-3, 5e-3, 1e-2)
    shape: GPTConfig = field(default_factory=lambda: GPTConfig(dim=48, layers=2, heads=4, context=64))
    replicas: int = 4
    sequences: int = 4
    shards: bool = False
    teacher: bool = False
    warm_up: int = 100
    switch: int = 500
    decay: int = 1600
    steps: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    rule: str = "adopt"
    device: str = "cpu"
    bfloat16: bool = False  # forward and backward; parameters, momenta and what travels stay float32

    def objective(self, seed: int) -> Network:
        """What its replicas minimise. However a batch is divided among replicas, it is the same batch."""
        if self.teacher:
            return _teacher(self, seed)
        return small_gpt(
            self.shape,
            sequences=self.sequences,
            replicas=self.replicas,
            seed=seed,
            held_out=4,
            shards=self.shards,
            device=self.device,
            text=self.text(),
        )

    def text(self) -> Text:
        """What is trained on, and what is held out."""
        return of_library()

    def rate(self, step: int) -> float:
        """Of step 0, 1, ...: linear, constant, and 1 - sqrt to 0, as in MT-DAO's public code."""
        if step < self.decay:
            return min(1.0, (step + 1) / self.warm_up)
        return 1 - ((step - self.decay) / (self.steps - self.decay)) ** 0.5


SETTINGS = {
    "68k": Setting(),
    "Adam": Setting(rule="adam", rates=(2.5e-3, 5e-3, 1e-2)),
    "2 replicas": Setting(replicas=2, sequences=8, rates=(2.5e-3, 5e-3)),
    "8 replicas": Setting(replicas=8, sequences=2, rates=(2.5e-3, 5e-3)),
    "one node": Setting(replicas=1, sequences=16),
    "batch x 4": Setting(sequences=16, rates=(2.5e-3, 5e-3)),
    "own parts of the text": Setting(shards=True, rates=(2.5e-3, 5e-3)),
    "twice as long": Setting(switch=1000, decay=3200, steps=4000, rates=(1.25e-3, 2.5e-3)),
    "13k": Setting(shape=GPTConfig(dim=24, layers=1, heads=2, context=64), rates=(2.5e-3, 5e-3, 1e-2)),
    "teacher": Setting(teacher=True, sequences=8, rates=(1e-3, 2.5e-3, 5e-3, 1e-2)),
}


class Student(nn.Module):
    """Cross-entropy of a network of two hidden layers. (B, 32), (B,) -> ()."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _layers()

    def forward(self, points: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(points), classes)


def _layers() -> nn.Sequential:
    sizes = (INPUTS, WIDTH, WIDTH, CLASSES)
    parts: list[nn.Module] = []
    for into, out in zip(sizes, sizes[1:]):
        parts += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _teacher(setting: Setting, seed: int) -> Network:
    torch.manual_seed(12345)
    teacher = _layers()
    for param in teacher.parameters():
        nn.init.normal_(param, std=2.0 / param.shape[-1] ** 0.5 if param.ndim == 2 else 0.5)

    @torch.no_grad()
    def drawn(shape: tuple[int, ...], generator: torch.Generator, wrong: float) -> tuple[Any, Any]:
        points = torch.randn(*shape, INPUTS, generator=generator)
        classes = teacher(points).argmax(-1)
        other = torch.randint(CLASSES, shape, generator=generator)
        return points, torch.where(torch.rand(shape, generator=generator) < wrong, other, classes)

    def batches(ids: Any, step: int) -> tuple[Any, Any]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        points, classes = drawn((setting.replicas, setting.sequences), generator, 0.1)
        return points[ids], classes[ids]

    held_out = drawn((8192,), torch.Generator().manual_seed(999), 0.0)
    torch.manual_seed(seed)
    return Network(Student(), batches, [held_out])
