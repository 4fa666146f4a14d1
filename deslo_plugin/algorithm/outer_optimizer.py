"""SERVER of DES-LOC, Algorithm 1: what the replicas make of their averaged parameters before going on from them."""

from collections.abc import Mapping

import torch

from deslo_plugin.algorithm.rules import Tensors


def mean_(x: Tensors, averaged: Tensors) -> None:
    """x <- E_m[x]: the plain average."""
    torch._foreach_copy_(x, averaged)


def nesterov_(x: Tensors, averaged: Tensors, anchor: Tensors, momentum: Tensors, *, lr: float, beta: float) -> None:
    """Nesterov step along the averaged progress, from ``anchor``, the parameters after the last outer step.

        delta <- anchor - E_m[x];  m <- beta m + delta;  x <- anchor - lr (beta m + delta)

    As in DiLoCo and in torch.optim.SGD(nesterov=True). All replicas hold equal ``anchor`` and ``momentum``, so these
    need no average. With beta = 0 and lr = 1 it is ``mean_``.
    """
    delta = torch._foreach_sub(anchor, averaged)
    torch._foreach_mul_(momentum, beta)
    torch._foreach_add_(momentum, delta)
    torch._foreach_add_(anchor, delta, alpha=-lr)
    torch._foreach_add_(anchor, momentum, alpha=-lr * beta)
    torch._foreach_copy_(x, anchor)


def write_means(states: Mapping[str, Tensors], means: Mapping[str, Tensors]) -> None:
    """states <- means, in place."""
    for state, mean in means.items():
        mean_(states[state], mean)
