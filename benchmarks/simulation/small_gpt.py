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
Text = tuple[Tensor, Tensor]
"""What is trained on and what is held out, (bytes,) uint8 each."""


def small_gpt(
    shape: GPTConfig,
    *,
    sequences: int,
    replicas: int,
    seed: int,
    held_out: int = 1,
    shards: bool = False,
    device: str = "cpu",
    text: Text | None = None,
) -> Network:
    """A GPT initialised from ``seed``, on windows drawn for (seed, step, replica), judged by ``held_out`` batches."""
    text = text or of_library()
    batches = drawn(shape, sequences=sequences, replicas=replicas, seed=seed, shards=shards, device=device, text=text)
    model, judged = initial(shape, seed).to(device), kept(shape, held_out, device, text)
    return Network(model, batches, judged, vectorised=device == "cpu")  # one replica's batch fills a GPU


def initial(shape: GPTConfig, seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(shape)


def drawn(
    shape: GPTConfig,
    *,
    sequences: int,
    replicas: int,
    seed: int,
    shards: bool = False,
    device: str = "cpu",
    text: Text | None = None,
) -> Batches:
    """Windows of ``text``, by default the standard library's, drawn for (seed, step, replica).

    ``sequences`` windows for each replica and step; ``replicas`` is how many ever take part, and with ``shards`` each
    draws from a part of the text of its own.
    """
    train, _ = text or of_library()
    span = torch.arange(shape.context + 1)
    part = len(train) // replicas if shards else len(train)
    firsts = torch.arange(replicas)[:, None] * part if shards else 0

    def batches(ids: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        starts = (firsts + torch.randint(part - shape.context, (replicas, sequences), generator=generator))[ids]
        windows = train[starts[..., None] + span].long().to(device)
        return windows[..., :-1], windows[..., 1:]

    return batches


def kept(shape: GPTConfig, held_out: int, device: str = "cpu", text: Text | None = None) -> list[tuple[Tensor, Tensor]]:
    """``held_out`` batches of 64 windows of text that is never trained on, the same for every seed; fewer where the
    text has not as many windows."""
    windows = Windows((text or of_library())[1], shape.context, seed=0)
    batch = [windows[index] for index in range(min(HELD_OUT * held_out, len(windows.order)))]
    tokens, targets = (torch.stack(each).to(device).split(HELD_OUT) for each in zip(*batch))
    return list(zip(tokens, targets))


@functools.cache
def of_library() -> Text:
    """The standard library's sources."""
    return split(load_bytes(), 0.05)
