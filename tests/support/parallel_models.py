"""Small models over (batch, length, width) that the ranks of a replica can share, and their data."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, LENGTH, BATCH = 6, 4, 4


def net() -> nn.Sequential:
    """A norm, two layers and a head, over (batch, length, width)."""
    torch.manual_seed(5)
    parts = [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)]
    with torch.no_grad():
        parts[0].weight.add_(0.1 * torch.randn(WIDTH))
    return nn.Sequential(*parts)


def batch(seat: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one data-parallel rank."""
    generator = torch.Generator().manual_seed(1000 * seat + step)
    inputs, targets = torch.randn(2, BATCH, LENGTH, WIDTH, generator=generator)
    return inputs, targets


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


class Experts(nn.Module):
    """Even positions of a sequence pass through the first half of the experts, odd ones through the second: here those
    of ``own`` alone, to which ``exchange`` brings what all ranks have for them, and brings it back."""

    def __init__(self, own: Sequence[int] = (0, 1), exchange: Callable = lambda tokens: tokens):
        super().__init__()
        torch.manual_seed(6)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.experts = nn.ModuleDict({str(index): layers[index] for index in own})
        self.exchange = exchange

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.exchange(torch.stack([inputs[:, 0::2], inputs[:, 1::2]]))  # by expert
        of_each = [expert(each) for expert, each in zip(self.experts.values(), tokens.chunk(len(self.experts)))]
        outputs = self.exchange(torch.cat(of_each))
        return torch.stack([outputs[0], outputs[1]], 2).flatten(1, 2)


def moe(**options: Any) -> nn.Sequential:
    return nn.Sequential(*net(), Experts(**options))


class Attention(nn.Module):
    """Over the whole sequence, of which ``gather`` brings what other ranks have."""

    def __init__(self, gather: Callable = lambda tensor: tensor):
        super().__init__()
        self.project, self.gather = nn.Linear(WIDTH, 3 * WIDTH), gather

    def forward(self, inputs: Tensor) -> Tensor:
        queries, keys, values = self.project(inputs).chunk(3, -1)
        scores = queries @ self.gather(keys).transpose(1, 2)
        return scores.softmax(-1) @ self.gather(values)


def attention(**options: Any) -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(nn.LayerNorm(WIDTH), Attention(**options), nn.Linear(WIDTH, WIDTH))
