"""Coordinates whose gradient is often zero on some replicas: what averages of momenta on unequal periods do to them.

    OMP_NUM_THREADS=1 python benchmarks/rare.py [--processes 2]     # minutes on two cores
    python benchmarks/rare.py --show                                # the tables and the figure of what is there

Four simulated replicas, periods 16 / 48 / 96, three seeds. Three tasks: a language of Zipf-distributed tokens with an untied
embedding, a small convolutional network in the manner of DeepSpeed's CIFAR example on synthetic images, whose ReLUs die, and the
byte-level transformer of ``deslo simulate``, whose gradients are dense. Writes benchmarks/results/rare.json, prints the tables
of docs/rare-coordinates.md and draws docs/figures/rare.png.
"""

import json
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from deslo_plugin import NonFiniteError
from deslo_plugin.names import PARAMS, SECOND_MOMENT
from deslo_plugin.outer import mean_
from deslo_plugin.simulation import Network, Replicas, simulate, warmup_cosine
from deslo_plugin.simulation.language import language, read_text, standard_library

RESULTS = Path(__file__).resolve().parent / "results" / "rare.json"
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "rare.png"
REPLICAS, SEEDS, PERIOD, NORM_CLIP = 4, (0, 1, 2), 16, 1.0
VOCABULARY, CLASSES, COMMON = 2000, 40, 200  # tokens; what the next one depends on; those that are not called rare
PIXELS, LABELS = 16, 10


class Zipf(nn.Module):
    """Next-token prediction, (B,) tokens and targets -> nats; embedding and head are untied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, 16))
        self.norm, self.hidden, self.head = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(F.gelu(self.hidden(self.norm(self.embedding[tokens])))), targets)


class Images(nn.Module):
    """Two convolutions and three linear layers with ReLUs, (B, 3, 16, 16) images and labels -> nats."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, LABELS),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(images), labels)


class Task(NamedTuple):
    """``objective(seed)`` -> what is minimised and, where there is one, the same judged on what is rare."""

    objective: Callable[[int], tuple[Network, Network | None]]
    steps: int
    lr: float
    betas: tuple[float, float]


def built(model: Callable[[], nn.Module], seed: int, batches: Any, held_out: Sequence[Sequence[Tensor]]) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(model(), batches, held_out)


def zipf(seed: int) -> tuple[Network, Network]:
    """Tokens by Zipf's law; each has a class, which names the class of the next token, Zipf-distributed within it."""
    generator = torch.Generator().manual_seed(7 + seed)
    classes = torch.randint(CLASSES, (VOCABULARY,), generator=generator)
    follows, chances = torch.randperm(CLASSES, generator=generator), 1 / torch.arange(1.0, VOCABULARY + 1)
    of_class = (classes == torch.arange(CLASSES)[:, None]) * chances

    def drawn(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return tokens, torch.multinomial(of_class[follows[classes[tokens]]], 1, generator=generator).flatten()

    def batches(ids: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        tokens = torch.multinomial(chances, REPLICAS * 64, True, generator=generator)
        return tuple(each.view(REPLICAS, 64)[list(ids)] for each in drawn(tokens, generator))

    generator = torch.Generator().manual_seed(10**9)
    common = [drawn(torch.multinomial(chances, 4096, True, generator=generator), generator)]
    rare = [drawn(torch.randint(COMMON, VOCABULARY, (4096,), generator=generator), generator)]
    return built(Zipf, seed, batches, common), built(Zipf, seed, batches, rare)


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
    "rare tokens": Task(zipf, 1152, 3e-3, (0.9, 0.95)),
    "dead ReLUs": Task(images, 576, 1e-3, (0.8, 0.999)),
    "dense": Task(dense, 576, 3e-3, (0.9, 0.95)),
}


def unguarded(optimizer: Any, states: Mapping[str, Any], means: Mapping[str, Any], bound: float) -> None:
    for state, mean in means.items():
        mean_(states[state], mean)


def hold_first(optimizer: Any, states: Mapping[str, Any], means: Mapping[str, Any], bound: float) -> None:
    """(a) |u| <= C sqrt(v), by u."""
    unguarded(optimizer, states, means, bound)
    for state in optimizer.state.values():
        limit = bound * state[SECOND_MOMENT].sqrt()
        state["exp_avg"].clamp_(-limit, limit)


def raise_second(optimizer: Any, states: Mapping[str, Any], means: Mapping[str, Any], bound: float) -> None:
    """(b) |u| <= C sqrt(v), by v."""
    unguarded(optimizer, states, means, bound)
    for state in optimizer.state.values():
        state[SECOND_MOMENT].copy_(torch.maximum(state[SECOND_MOMENT], (state["exp_avg"] / bound).square()))


class Method(NamedTuple):
    """Multiples of the parameters' period, and what writes the means; ``None``: what ``DesLoc`` does."""

    first: int | None
    second: int | None
    receive: Callable[..., None] | None = None
    rule: str = "adam"
    synchronous: bool = False


METHODS = {
    "synchronous AdamW": Method(1, 1, synchronous=True),
    "Local Adam": Method(1, 1),
    "DES-LOC, as printed": Method(3, 6, unguarded),
    "(a) hold the first momentum": Method(3, 6, hold_first),
    "(b) raise the second": Method(3, 6, raise_second),
    "(c) average both at 3x": Method(3, 3),
    "DES-LOC, ADOPT": Method(3, 6, rule="adopt"),
}


def train(task: str, method: str, seed: int) -> dict[str, Any]:
    """Held-out nats of the replicas' mean, the largest step of a coordinate in units of the rate, and bytes of a replica."""
    torch.set_num_threads(1)
    what, how = TASKS[task], METHODS[method]
    objective, rare = what.objective(seed)
    (beta, beta2), every = what.betas, {PARAMS: PERIOD, "exp_avg": how.first * PERIOD, SECOND_MOMENT: how.second * PERIOD}
    params = {"rule": how.rule, "lr": what.lr, "betas": what.betas, "sync_every": every}
    config = {"optimizer": {"params": params}, "deslo": {"synchronous_steps": what.steps * how.synchronous}}
    bound, rate = (1 - beta) / math.sqrt((1 - beta2) * (1 - beta**2 / beta2)), warmup_cosine(what.steps)
    moves, before = [], objective.start
    try:
        for moment in simulate(objective, config, replicas=REPLICAS, steps=what.steps, rate=rate, norm_clip=NORM_CLIP):
            world: Replicas = moment.replicas
            averaging = world.optimizer.averaging
            if how.receive and moment.steps == 1:
                averaging.receive = lambda _, *landed, how=how, own=world.optimizer: how.receive(own, *landed, bound)
            now = world.state(PARAMS)
            moves.append(float((now - before).abs().max()) / (what.lr * rate(moment.steps - 1)))
            before = now
    except NonFiniteError:
        moves.append(math.inf)
    judged = {name: float(each.evaluate(now.mean(0, keepdim=True))) for name, each in (("loss", objective), ("rare", rare)) if each}
    return {"seed": seed, "largest": max(moves), "moves": [round(each, 2) for each in moves],
            "bytes": sum(world.optimizer.meter.bytes.values())} | judged
