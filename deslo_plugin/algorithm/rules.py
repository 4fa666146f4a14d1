"""The local update rules, in the papers' letters: what one replica does with its own gradient at step t.

Every rule updates lists of tensors in place. The lists run over parameters; all tensors at one position share a shape.

    x  parameters                       g  gradients (never written)
    u  first momenta, ``u[j]`` a list   v  second momentum
    t  updates made before this one: 0, 1, 2, ...

The N momenta form one direction, the quasi-hyperbolic mix of MT-DAO (arXiv 2510.05361, Alg. 1):

    u_j <- beta_j u_j + (1 - beta_j) g                j = 1..N
    d    = (1 - sum_j w_j) g + sum_j w_j u_j

DES-LOC (arXiv 2505.22549) is the case N = 1, w = 1. Weight decay is decoupled: x <- (1 - lr weight_decay) x.
Lists of float64 tensors are computed in float64, lists of float32 tensors in float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import PARAMS, SECOND_MOMENT

Tensors = list[Tensor] | tuple[Tensor, ...]
"""What torch's operators on lists of tensors take."""


def sgdm_(
    x: Tensors,
    g: Tensors,
    u: Sequence[Tensors],
    *,
    t: int,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
    weights: Sequence[float],
) -> None:
    """SGD with momenta in exponential-average form: DES-LOC-SGDM (arXiv 2505.22549, Alg. 4), MT-DAO-SGDM."""
    _decay_weights_(x, lr, weight_decay)
    for u_j, beta in zip(u, betas):
        torch._foreach_lerp_(u_j, g, 1 - beta)
    d, scale = _mix(g, u, weights)
    torch._foreach_add_(x, d, alpha=-lr * scale)


def adam_(
    x: Tensors,
    g: Tensors,
    u: Sequence[Tensors],
    v: Tensors,
    *,
    t: int,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
    weights: Sequence[float],
    beta2: float,
    eps: float,
    bias_correction: bool,
) -> None:
    """Adam: x <- x - lr d / (sqrt(v) + eps), u and v first (arXiv 2505.22549, Alg. 2; arXiv 2510.05361, Alg. 1).

    ``bias_correction`` divides each u_j by 1 - beta_j^(t+1) and v by 1 - beta2^(t+1); the printed algorithms have
    none. DES-LOC prints sqrt(v + lambda^2) as denominator; this is torch's and MT-DAO's sqrt(v) + eps.
    """
    _decay_weights_(x, lr, weight_decay)
    for u_j, beta in zip(u, betas):
        torch._foreach_lerp_(u_j, g, 1 - beta)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)

    root = 1.0  # sqrt(1 - beta2^(t+1)) multiplies eps and the step instead of dividing every sqrt(v)
    weights_hat = weights
    if bias_correction:
        weights_hat = [w / (1 - beta ** (t + 1)) for w, beta in zip(weights, betas)]
        root = math.sqrt(1 - beta2 ** (t + 1))
    d, scale = _mix(g, u, weights_hat, rest=1 - math.fsum(weights))
    denominator = torch._foreach_sqrt(v)
    torch._foreach_add_(denominator, eps * root)
    torch._foreach_addcdiv_(x, d, denominator, value=-lr * scale * root)


def adopt_(
    x: Tensors,
    g: Tensors,
    u: Sequence[Tensors],
    v: Tensors,
    *,
    t: int,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
    weights: Sequence[float],
    beta2: float,
    eps: float,
) -> None:
    """ADOPT: the gradient is normalised by the OLD v, and v is updated last (arXiv 2505.22549, Alg. 3).

        n = clamp(g / max(sqrt(v), eps), -t^(1/4), +t^(1/4))

    The printed algorithm has neither the clamp nor a first step. As in the ADOPT authors' code, the first step
    (t = 0) only sets v = g^2.
    """
    if t == 0:
        torch._foreach_copy_(v, torch._foreach_mul(g, g))
        return
    _decay_weights_(x, lr, weight_decay)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_clamp_min_(denominator, eps)
    n = torch._foreach_div(g, denominator)
    torch._foreach_clamp_min_(n, -(t**0.25))
    torch._foreach_clamp_max_(n, t**0.25)
    for u_j, beta in zip(u, betas):
        torch._foreach_lerp_(u_j, n, 1 - beta)
    d, scale = _mix(n, u, weights)
    torch._foreach_add_(x, d, alpha=-lr * scale)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)


def muon_(
    x: Tensors,
    g: Tensors,
    u: Sequence[Tensors],
    *,
    t: int,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
    weights: Sequence[float],
    orthogonalise: Callable[[Tensors], Tensors],
) -> None:
    """Muon (K. Jordan, 2024; arXiv 2502.16982) with the momenta of MT-DAO: x <- x - lr orthogonalise(d).

    Nesterov's momentum in exponential-average form is the mix with weight w = beta: (1 - beta) g + beta u, as in
    ``torch.optim.Muon``. ``orthogonalise`` gets the directions of all x, which may be parts of matrices, and gives
    what each moves along, times its own factor of the rate (``algorithm.orthogonal``).
    """
    _decay_weights_(x, lr, weight_decay)
    for u_j, beta in zip(u, betas):
        torch._foreach_lerp_(u_j, g, 1 - beta)
    d, _ = _mix(g, u, weights)  # whose length does not matter
    torch._foreach_add_(x, orthogonalise(d), alpha=-lr)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One local rule, and all that anything else asks about it. A new rule is one of these and its twin in
    ``csrc/rules.h``; one of matrices is made of torch's products, which need no twin.

    Attributes:
        title: as people call it.
        update: what it does, in the papers' letters.
        eps: what its denominator has by default; None for a rule without second moment.
        corrects_bias: whether it has the switch ``bias_correction``, which is on by default.
        bounds_momenta: whether each |u| <= C sqrt(v), as ``momentum_bound`` holds it: u and v average the same
            gradients.
        sets_v_first: whether the update t = 0 sets v and moves nothing else.
        beta: of its first momentum by default.
        of_matrices: whether it updates whole matrices, by directions made orthogonal; all else is for another rule.
    """

    title: str
    update: Callable[..., None]
    eps: float | None = None
    corrects_bias: bool = False
    bounds_momenta: bool = False
    sets_v_first: bool = False
    beta: float = 0.9
    of_matrices: bool = False

    @property
    def has_second_moment(self) -> bool:
        return self.eps is not None

    def remains(self, t: int, shrinks_by: float, betas: Mapping[str, float]) -> dict[str, float]:
        """What update ``t`` leaves of a difference in each state: of x 1 - ``shrinks_by``, of a momentum its beta."""
        if self.sets_v_first and t == 0:
            return {SECOND_MOMENT: 0.0}
        return {PARAMS: 1 - shrinks_by, **betas}


RULES: Mapping[str, Rule] = {
    "sgdm": Rule(title="SGDM", update=sgdm_),
    "adam": Rule(title="Adam", update=adam_, eps=1e-8, corrects_bias=True, bounds_momenta=True),
    "adopt": Rule(title="ADOPT", update=adopt_, eps=1e-6, sets_v_first=True),
    "muon": Rule(title="Muon", update=muon_, beta=0.95, of_matrices=True),
}


def clipped(g: Tensors, rho: float) -> Tensors:
    """g with every coordinate in [-rho, rho]: the clipping of the papers' theory. Not in place.

    Infinities become NaN instead of rho, so that a broken gradient is not mistaken for a large one.
    """
    h = torch._foreach_clamp_min(g, -rho)
    torch._foreach_clamp_max_(h, rho)
    torch._foreach_add_(h, torch._foreach_mul(g, 0.0))
    return h


def _decay_weights_(x: Tensors, lr: float, weight_decay: float) -> None:
    if weight_decay:
        torch._foreach_mul_(x, 1 - lr * weight_decay)


def _mix(
    g: Tensors, u: Sequence[Tensors], weights: Sequence[float], rest: float | None = None
) -> tuple[Tensors, float]:
    """d = rest g + sum_j w_j u_j as ``(d / scale, scale)``: a direction of one term is that term, not a copy."""
    rest = 1 - math.fsum(weights) if rest is None else rest
    terms = [(w, z) for w, z in zip([rest, *weights], [g, *u]) if abs(w) > 1e-12]
    (scale, d), *others = terms
    if not others:
        return d, scale
    d = torch._foreach_mul(d, scale)
    for w, z in others:
        torch._foreach_add_(d, z, alpha=w)
    return d, 1.0
