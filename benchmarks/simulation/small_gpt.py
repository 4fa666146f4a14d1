"""The byte-level GPT of examples/ as an objective of simulated replicas."""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deslo_plugin.simulation import Network
from examples.harness.corpus import Windows, load_bytes, split
from examples.harness.gpt import GPT, GPTConfig

HELD_OUT = 64  # windows of a held-out batch

# attention has no vectorised form on the CPU and runs replica by replica: measured, this costs nothing there
warnings.filterwarnings(
    "ignore", message="There is a performance drop because we have not yet implemented the batching rule"
)


Batches = Callable[[Sequence[int], int], tuple[Tensor, Tensor]]
"""(replicas, step) -> tokens and targets, (len(replicas), sequences, context) each."""


def small_gpt(
    shape: GPTConfig,
    *,
    sequences: int,
    replicas: int,
    seed: int,
    held_out: int = 1,
    shards: bool = False,
    device: str = "cpu",
) -> Network:
    """A GPT initialised from ``seed``, on windows drawn for (seed, step, replica), judged by ``held_out`` batches."""
    batches = drawn(shape, sequences=sequences, replicas=replicas, seed=seed, shards=shards, device=device)
    return Network(initial(shape, seed).to(device), batches, kept(shape, held_out, device))


def initial(shape: GPTConfig, seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(shape)


def drawn(
    shape: GPTConfig, *, sequences: int, replicas: int, seed: int, shards: bool = False, device: str = "cpu"
) -> Batches:
    """Windows of the standard library's text, drawn for (seed, step, replica).

    ``sequences`` windows for each replica and step; ``replicas`` is how many ever take part, and with ``shards`` each
    draws from a part of the text of its own.
    """
    train, _ = _text()
    span = torch.arange(shape.context + 1)
    part = len(train) // replicas if shards else len(train)
    firsts = torch.arange(replicas)[:, None] * part if shards else 0

    def batches(ids: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        starts = (firsts + torch.randint(part - shape.context, (replicas, sequences), generator=generator))[ids]
        windows = train[starts[..., None] + span].long().to(device)
        return windows[..., :-1], windows[..., 1:]

    return batches


def kept(shape: GPTConfig, held_out: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """``held_out`` batches of 64 windows of text that is never trained on, the same for every seed."""
    windows = Windows(_text()[1], shape.context, seed=0)
    batch = [windows[index] for index in range(HELD_OUT * held_out)]
    tokens, targets = (torch.stack(each).to(device).split(HELD_OUT) for each in zip(*batch))
    return list(zip(tokens, targets))


@functools.cache
def _text() -> tuple[Tensor, Tensor]:
    return split(load_bytes(), 0.05)
