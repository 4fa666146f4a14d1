"""What the papers prove of momenta between two averages, in closed form: what stays, what is noise, how far a state can
go.

K is the number of local steps since the average, M the number of replicas; gradients have independent noise of standard
deviation ``sigma`` in each coordinate. With u <- beta u + (1 - beta) g the momentum after K steps is

    u_{t+K} = beta^K u_t + (1 - beta) sum_{i<K} beta^i g_{t+K-i}

its shared part and its local part (arXiv 2510.05361, the analysis of slow momenta).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kept(beta: float, steps: float) -> float:
    """beta^K: the share of the average u_t that is left in u_{t+K}."""
    return beta**steps


def local_variance(beta: float, steps: float, sigma: float = 1.0) -> float:
    """(1-beta)/(1+beta) (1 - beta^(2K)) sigma^2: variance of a coordinate of the local part (arXiv 2510.05361).

    ``steps`` may be ``math.inf``: a momentum that is never averaged.
    """
    return (1 - beta) / (1 + beta) * (1 - beta ** (2 * steps)) * sigma**2


def shared_variance(beta: float, replicas: int, sigma: float = 1.0) -> float:
    """Variance of a coordinate of the mean over M replicas, long after the start: (1-beta)/(1+beta) sigma^2 / M.

    Averaging is linear, so that the mean follows the recurrence of one replica under noise of variance sigma^2 / M.
    """
    return local_variance(beta, math.inf, sigma) / replicas


def mutual_information(beta: float, steps: float, shared: Tensor, local: Tensor) -> float:
    """I(u_{t+K}; u_t) = 1/2 log det(I + beta^(2K) Sigma_U Sigma_L^-1) in nats (arXiv 2510.05361).

    What the momentum that a replica steps by still says of the average, both Gaussian. ``shared`` (n, n) is the
    covariance Sigma_U of the average, ``local`` (n, n) Sigma_L of the local part, positive definite.
    """
    ratio = torch.linalg.solve(local.double(), shared.double(), left=False)
    return 0.5 * float(torch.linalg.slogdet(torch.eye(len(ratio)) + beta ** (2 * steps) * ratio).logabsdet)


def first_momentum_drift(beta: float, steps: float, rho: float = 1.0) -> float:
    """2 rho (1 - beta^K) >= max_i |u_{t+K} - u_t|_i where gradients lie in [-rho, rho] (arXiv 2505.22549, App. I)."""
    return 2 * rho * (1 - beta**steps)


def second_momentum_drift(beta2: float, steps: float, rho: float = 1.0) -> float:
    """2 rho^2 (1 - beta2^K) >= max_i |v_{t+K} - v_t|_i where gradients lie in [-rho, rho] (arXiv 2505.22549, App.
    I)."""
    return first_momentum_drift(beta2, steps, rho**2)


def psi(params_period: int, betas: Sequence[float], weights: Sequence[float], periods: Sequence[int | None]) -> float:
    """psi = 4 (1-p_x)/p_x^2 sum_j w_j (1-beta_j)(1-p_j) / (1 - (1-p_j) beta_j), p = 1/K, 0 for a momentum never
    averaged.

    What periods cost the rate of MT-DAO-SGDM (arXiv 2510.05361), and of DES-LOC-SGDM with one momentum of weight 1
    (arXiv 2505.22549, Alg. 4): 4/sqrt(T) (f_0 - f* + L sigma^2/(2M)) + O((1 + psi)/T) after T steps.
    """
    p_x = 1 / params_period
    averaged = [(beta, weight, 1 / period if period else 0.0) for beta, weight, period in zip(betas, weights, periods)]
    disagreement = sum(w * (1 - beta) * (1 - p) / (1 - (1 - p) * beta) for beta, w, p in averaged)
    return 4 * (1 - p_x) / p_x**2 * disagreement


def proven_rate(beta: float, psi: float, smoothness: float = 1.0, dissimilarity: float = 1.0) -> float:
    """eta_0 = 1/(4L) min(1 - beta, 1/(6 sqrt(psi max(1, B^2 - 1)))): DES-LOC-SGDM converges up to it (arXiv
    2505.22549).

    ``smoothness`` is L, ``dissimilarity`` B: how many times longer replicas' gradients are than their mean, 1 where all
    minimise the same.
    """
    spread = psi * max(1.0, dissimilarity**2 - 1)
    return min(1 - beta, 1 / (6 * math.sqrt(spread)) if spread else math.inf) / (4 * smoothness)
