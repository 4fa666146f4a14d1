"""What simulated replicas minimise: small problems with known answers, noisy and different on each replica if so
wished.

What replica m draws at step t depends on the seed, m and t alone: algorithms, and populations, meet the same noise.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """A loss for each row of parameters; rows know nothing of each other."""

    start: Tensor
    """Where replicas start, (n,)."""

    def losses(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        """The loss that replica ``replicas[i]`` sees at ``step`` in row i of ``x`` (M, n): (M,), differentiable."""

    def evaluate(self, x: Tensor) -> Tensor:
        """The loss that is to be judged by, without noise or on held-out data, of each row of ``x`` (M, n): (M,)."""


def normal(seed: int, step: int, *shape: int) -> Tensor:
    """Standard normal numbers, float64, drawn for (seed, step)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1_000_003 * seed + step + 1), dtype=torch.float64)


class _Noisy:
    """Gaussian noise of each replica's own standard deviation on the gradient: a linear term of the loss."""

    start: Tensor

    def __init__(self, sigma: float | Tensor, replicas: int, seed: int):
        self.sigma, self.seed = torch.as_tensor(sigma, dtype=self.start.dtype).expand(replicas), seed

    def noise(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        draws = normal(self.seed, step, len(self.sigma), x.shape[1])[replicas].to(x)
        return self.sigma[replicas] * (draws * x).sum(1)


class Rosenbrock(_Noisy):
    """f = (1 - x1)^2 + 100 (x2 - x1^2)^2, its minimum 0 at (1, 1), with noise on the gradient.

    The toy problem of DES-LOC (arXiv 2505.22549, Fig. 2) with ``sigma`` 1.5 and 256 replicas. ``start`` (2,); ``sigma``
    one number, or one for each replica that ever takes part, ``replicas`` in all.
    """

    def __init__(self, start: Tensor, sigma: float | Tensor = 1.5, *, replicas: int, seed: int = 0):
        self.start = start
        super().__init__(sigma, replicas, seed)

    def losses(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        return self.evaluate(x) + self.noise(x, replicas, step)

    def evaluate(self, x: Tensor) -> Tensor:
        return (1 - x[:, 0]).square() + 100 * (x[:, 1] - x[:, 0].square()).square()


class Quadratic(_Noisy):
    """f_m = 1/2 sum_i s_i (x_i - c_mi)^2 with eigenvalues s (n,), noise on the gradient, and bowls that lie apart.

    The centres c_m are normal with standard deviation ``heterogeneity``. Over the ``replicas`` that ever take part they
    sum to 0, so that their mean loss is least at 0. Judged by the bowl at 0.
    """

    def __init__(
        self,
        start: Tensor,
        spectrum: Tensor,
        sigma: float | Tensor = 1.0,
        *,
        replicas: int,
        heterogeneity: float = 0.0,
        seed: int = 0,
    ):
        self.start, self.spectrum = start, spectrum.to(start)
        centres = normal(seed, -1, replicas, start.numel())
        self.centres = heterogeneity * (centres - centres.mean(0)).to(start)
        super().__init__(sigma, replicas, seed)

    def losses(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        return self.evaluate(x - self.centres[replicas]) + self.noise(x, replicas, step)

    def evaluate(self, x: Tensor) -> Tensor:
        return 0.5 * (self.spectrum * x.square()).sum(1)


class Logistic:
    """Logistic regression on fresh draws: features normal with the given standard deviations, labels -1 or 1 from true
    weights.

    Every replica's own true weights are those of all plus ``heterogeneity`` times a standard normal vector. Judged, in
    nats, on ``held_out`` draws of the weights of all.

    Args:
        spectrum: standard deviations of the features, (n,); the start is 0.
        batch: draws of each replica at each step.
        replicas: how many ever take part.
    """

    def __init__(
        self,
        spectrum: Tensor,
        *,
        batch: int,
        replicas: int,
        heterogeneity: float = 0.0,
        held_out: int = 4096,
        seed: int = 0,
    ):
        self.start, self.spectrum, self.batch, self.seed = torch.zeros_like(spectrum), spectrum, batch, seed
        truth = normal(seed, -1, 1 + replicas, spectrum.numel()).to(spectrum)
        self.truths = truth[0] + heterogeneity * truth[1:]
        self.held_out = self._signed(normal(seed, -2, 1, held_out, spectrum.numel() + 1), truth[:1])

    def losses(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        draws = normal(self.seed, step, len(self.truths), self.batch, x.shape[1] + 1)[replicas]
        return self._nats(self._signed(draws, self.truths[replicas]), x)

    def evaluate(self, x: Tensor) -> Tensor:
        return self._nats(self.held_out, x)

    def _signed(self, draws: Tensor, truths: Tensor) -> Tensor:
        """Features times their labels, (M, batch, n): all that the loss needs. The last number of a draw decides the
        label."""
        features = self.spectrum * draws[..., :-1].to(self.spectrum)
        chance = torch.special.ndtr(draws[..., -1]).to(features)
        return (
            torch.where(chance < torch.sigmoid((features * truths[:, None]).sum(-1)), 1.0, -1.0)[..., None] * features
        )

    @staticmethod
    def _nats(signed: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(signed * x[:, None]).sum(-1)).mean(1)
