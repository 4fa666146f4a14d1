"""Small models over (batch, length, width) that the ranks of a replica can share, their data, and what they come to by
the oracle."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.support import oracle
from tests.support.theory import CLIP

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
        outputs = self.exchange(self.apply_own(self.exchange(torch.stack([inputs[:, 0::2], inputs[:, 1::2]]))))
        return torch.stack([outputs[0], outputs[1]], 2).flatten(1, 2)

    def apply_own(self, tokens: Tensor) -> Tensor:
        """``tokens`` are by expert, of all ranks for this one's."""
        return torch.cat([each(part) for each, part in zip(self.experts.values(), tokens.chunk(len(self.experts)))])


class StackedExperts(Experts):
    """Their matrices are one tensor, cut over ``mesh`` if one is given."""

    def __init__(self, exchange: Callable = lambda tokens: tokens, mesh: DeviceMesh | None = None):
        super().__init__(exchange=exchange)
        weight = torch.stack([expert.weight.detach() for expert in self.experts.values()])
        del self.experts
        self.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]) if mesh is not None else weight)

    def apply_own(self, tokens: Tensor) -> Tensor:
        own = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return torch.cat([part @ each for each, part in zip(own, tokens.chunk(len(own)))])


def moe(**options: Any) -> nn.Sequential:
    return nn.Sequential(*net(), Experts(**options))


def stacked_moe(**options: Any) -> nn.Sequential:
    return nn.Sequential(*net(), StackedExperts(**options))


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


def theory(
    s: oracle.Setting, steps: int, seats: int, build: Callable = net, replicas: int = 2, **options: Any
) -> list[dict]:
    """replica -> state -> parameter name -> flat tensor; a replica has ``seats`` data-parallel ranks."""
    model = build().double()
    params = dict(model.named_parameters())

    def gradient(replica: int, step: int, vectors: list[Tensor]) -> list[Tensor]:
        torch.nn.utils.vector_to_parameters(vectors[0], params.values())
        model.zero_grad()
        for seat in range(replica * seats, (replica + 1) * seats):
            inputs, targets = batch(seat, step)
            (loss_of(model(inputs.double()), targets.double()) / seats).backward()
        return [torch.cat([param.grad.flatten() for param in params.values()])]

    start = torch.cat([param.detach().flatten() for param in params.values()])
    world = oracle.train([s], [start], replicas, steps, gradient, norm_clip=CLIP, **options)
    sizes = [param.numel() for param in params.values()]
    return [
        {state: dict(zip(params, vector.split(sizes))) for state, vector in oracle.states(s, group).items()}
        for (group,) in world
    ]
