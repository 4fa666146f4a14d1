"""A small language model of bytes as an objective: what algorithms do to a transformer, in minutes on one core."""

import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deslo_plugin.errors import ConfigError
from deslo_plugin.simulation.module_objective import Network

BYTES, WIDTH, LAYERS, HEADS, CONTEXT = 256, 32, 2, 2, 32
SEQUENCES = 4  # windows of a replica's batch
HELD_OUT = 256  # windows to judge by
BLOCK = 1 << 14  # bytes held out in one piece, one in twenty


class ByteModel(nn.Module):
    """A causal transformer of 33,984 parameters: (B, 32) int64 tokens and targets -> mean cross-entropy in nats, ()."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(BYTES, WIDTH))
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True, bias=False
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        for param in self.layers.parameters():  # the layers of TransformerEncoder are copies: drawn anew, they differ
            if param.ndim > 1:
                nn.init.xavier_uniform_(param)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the one that torch.func.vmap takes over replicas in one pass
            hidden = self.layers(self.embedding[tokens] + self.position, mask=self.mask)
        logits = nn.functional.linear(hidden, self.embedding)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def standard_library() -> list[Path]:
    """Python's own modules, the same for every run of one version: text that is always there."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def read_text(files: Iterable[Path]) -> Tensor:
    """The files one after the other, (length,) uint8. Raises ``ConfigError`` for one that is missing, or too short a
    text."""
    files = list(files)
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError("--data", "a file of text", repr(str(missing[0])), "check the path")
    text = b"".join(file.read_bytes() for file in files)
    if len(text) < 20 * BLOCK:
        raise ConfigError(
            "--data", f"a text of {20 * BLOCK:,} bytes or more", f"{len(text):,} bytes", "give a longer one"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def language(text: Tensor, *, replicas: int, heterogeneity: float = 0.0, seed: int = 0, device: str = "cpu") -> Network:
    """``ByteModel``, initialised from ``seed``, on windows of ``text`` drawn for (seed, step, replica).

    Args:
        text: (length,) uint8; every twentieth block of it is held out.
        replicas: how many ever take part.
        heterogeneity: share in [0, 1] of its windows that a replica reads in a part of the text that is its own; it
            draws the others from the whole. 0 is the same distribution for all.

    Raises ``ConfigError`` for more replicas than the text has windows.
    """
    blocks = text.split(BLOCK)
    held_out = torch.cat(blocks[19::20])
    train = torch.cat([block for number, block in enumerate(blocks, 1) if number % 20]).to(device)
    span, part = torch.arange(CONTEXT + 1), len(train) // replicas
    if part <= CONTEXT:
        raise ConfigError(
            "--data",
            f"a text of more than {CONTEXT} bytes for each of {replicas} replicas",
            f"{len(train):,} bytes",
            "give a longer one",
        )

    def windows(source: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        found = source[(starts[..., None] + span).to(source.device)].long()
        return found[..., :-1], found[..., 1:]

    def batches(ids: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        whole, own = torch.rand(2, replicas, SEQUENCES, generator=generator, dtype=torch.float64)[:, ids]
        starts = torch.as_tensor(ids)[:, None] * part + own * (part - CONTEXT)
        at_home = torch.rand(replicas, SEQUENCES, generator=generator)[ids] < heterogeneity
        return windows(train, torch.where(at_home, starts, whole * (len(train) - CONTEXT)).long())

    every = (len(held_out) - CONTEXT) // HELD_OUT
    judged = tuple(each.to(device) for each in windows(held_out, torch.arange(HELD_OUT) * every))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteModel()
    return Network(model.to(device), batches, [judged])
