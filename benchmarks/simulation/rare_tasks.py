"""Tasks in which some coordinates seldom have a gradient, for rare.py."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deslo_plugin.simulation import Network, Objective
from deslo_plugin.simulation.byte_lm import language, read_text, standard_library

REPLICAS = 4
VOCABULARY, CLASSES, COMMON = 600, 12, 60  # tokens; what the next one depends on; those that are not called rare
BATCH = 16  # tokens of a replica in a step
PIXELS, LABELS = 16, 10
COORDINATES = 2000


class Zipf(nn.Module):
    """Next-token prediction, (B,) tokens and targets -> nats; embedding and head are untied."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.embedding, self.norm = (
            nn.Parameter(torch.randn(VOCABULARY, 16)),
            nn.LayerNorm(16) if normalised else nn.Identity(),
        )
        self.hidden, self.head = nn.Linear(16, 48), nn.Linear(48, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(F.gelu(self.hidden(self.norm(self.embedding[tokens])))), targets)


class Images(nn.Module):
    """Two convolutions and three linear layers with ReLUs, (B, 3, 16, 16) images and labels -> nats."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, LABELS),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(images), labels)


class Sparse:
    """1/2 sum (x_i - c_i)^2 with noise of deviation 2 on the gradient; a replica sees coordinate i with chance min(1,
    40 / i).

    Judged by the mean square of x - c; ``rare`` coordinates are seen in less than a tenth of the steps.
    """

    def __init__(self, seed: int, replicas: int, afar: bool, rare: bool = False):
        self.seed, self.replicas, self.judged = seed, replicas, slice(400 * rare, None)
        self.centre = torch.randn(COORDINATES, generator=torch.Generator().manual_seed(seed))
        self.chances = (40 / torch.arange(1, COORDINATES + 1)).clamp(max=1)
        self.start = torch.zeros(COORDINATES) if afar else self.centre.clone()

    def losses(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        generator, shape = torch.Generator().manual_seed(1_000_003 * self.seed + step), (self.replicas, COORDINATES)
        seen, noise = torch.rand(shape, generator=generator) < self.chances, torch.randn(shape, generator=generator)
        slopes = (x.detach() - self.centre + 2 * noise[list(replicas)]) * seen[list(replicas)]
        return (slopes * x).sum(1)

    def evaluate(self, x: Tensor) -> Tensor:
        return (x - self.centre)[:, self.judged].square().mean(1)


class Task(NamedTuple):
    """``objective(seed)`` -> what is minimised and, where there is one, the same judged on what is rare."""

    objective: Callable[[int], tuple[Objective, Objective | None]]
    steps: int
    lr: float
    betas: tuple[float, float]
    replicas: int = 4


def built(model: Callable[[], nn.Module], seed: int, batches: Any, held_out: Sequence[Sequence[Tensor]]) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(model(), batches, held_out)


def sparse(seed: int, afar: bool) -> tuple[Sparse, Sparse]:
    return Sparse(seed, 16, afar), Sparse(seed, 16, afar, rare=True)


def zipf(seed: int, normalised: bool) -> tuple[Network, Network]:
    """Tokens by Zipf's law; each has a class, which names the class of the next token, Zipf-distributed within it."""
    generator = torch.Generator().manual_seed(7 + seed)
    classes = torch.randint(CLASSES, (VOCABULARY,), generator=generator)
    follows, chances = torch.randperm(CLASSES, generator=generator), 1 / torch.arange(1.0, VOCABULARY + 1)
    of_class = (classes == torch.arange(CLASSES)[:, None]) * chances

    def drawn(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return tokens, torch.multinomial(of_class[follows[classes[tokens]]], 1, generator=generator).flatten()

    def batches(ids: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        tokens = torch.multinomial(chances, REPLICAS * BATCH, True, generator=generator)
        return tuple(each.view(REPLICAS, BATCH)[list(ids)] for each in drawn(tokens, generator))

    generator = torch.Generator().manual_seed(10**9)
    common = [drawn(torch.multinomial(chances, 4096, True, generator=generator), generator)]
    rare = [drawn(torch.randint(COMMON, VOCABULARY, (4096,), generator=generator), generator)]
    model = partial(Zipf, normalised)
    return built(model, seed, batches, common), built(model, seed, batches, rare)


def images(seed: int) -> tuple[Network, None]:
    """A template for each label, shifted, under noise; a replica's batch has 4 images, as in DeepSpeed's example."""
    templates = torch.randn(LABELS, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(7 + seed))

    def drawn(generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(LABELS, shape, generator=generator)
        noise = torch.randn(*shape, 3, PIXELS, PIXELS, generator=generator)
        return 0.5 * templates[labels] + noise, labels

    def batches(ids: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return tuple(each[list(ids)] for each in drawn(generator, REPLICAS, 4))

    return built(Images, seed, batches, [drawn(torch.Generator().manual_seed(10**9), 2000)]), None


def dense(seed: int) -> tuple[Network, None]:
    return language(read_text(standard_library()), replicas=REPLICAS, seed=seed), None


TASKS = {
    "rare tokens": Task(partial(zipf, normalised=False), 768, 1e-2, (0.9, 0.95)),
    "rare tokens, normalised": Task(partial(zipf, normalised=True), 768, 1e-2, (0.9, 0.95)),
    "dead ReLUs": Task(images, 576, 1e-3, (0.8, 0.999)),
    "sparse quadratic from afar": Task(partial(sparse, afar=True), 768, 1e-2, (0.9, 0.95), replicas=16),
    "sparse quadratic from its minimum": Task(partial(sparse, afar=False), 768, 1e-2, (0.9, 0.95), replicas=16),
    "dense": Task(dense, 576, 3e-3, (0.9, 0.95)),
}
