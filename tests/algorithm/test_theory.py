"""The papers' formulas against momenta of ``DesLoc`` itself, in many replicas at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deslo_plugin import load_config
from deslo_plugin.algorithm.theory import (
    first_momentum_drift,
    local_variance,
    mutual_information,
    proven_rate,
    psi,
    second_momentum_drift,
    shared_variance,
)
from deslo_plugin.simulation import Quadratic, Replicas, simulate
from deslo_plugin.simulation.momentum_memory import memory, proven

BETAS = st.floats(0.05, 0.999)


def config(rule: str, every: dict[str, int], **params):
    params = {"rule": rule, "lr": 0.0, "sync_every": every} | params
    return {"optimizer": {"params": params}, "deslo": {"average_at": "after_step", "wire_dtype": "float64"}}


def pure_noise(beta: float, every: int, *, replicas: int, size: int, sigma: float, rounds: int, past: int) -> tuple:
    """(the average, (size,); every replica's momentum ``past`` steps after it, (replicas, size)), long after the
    start."""
    world = Replicas(
        torch.zeros(size, dtype=torch.float64),
        config("sgdm", {"params": every, "exp_avg": every}, betas=[beta]),
        replicas,
    )
    generator = torch.Generator().manual_seed(0)
    average = None
    for step in range(1, rounds * every + past + 1):
        world.step(sigma * torch.randn(replicas, size, generator=generator, dtype=torch.float64))
        if step == rounds * every:
            average = world.state("exp_avg")[0]
    return average, world.state("exp_avg")


@pytest.mark.parametrize("beta, past", [(0.9, 1), (0.9, 7), (0.9, 31), (0.99, 7), (0.99, 31), (0.999, 31)])
def test_the_variance_between_4096_replicas_is_the_formulas(beta, past):
    _, momenta = pure_noise(beta, 32, replicas=4096, size=1, sigma=1.5, rounds=1, past=past)
    expected = local_variance(beta, past, sigma=1.5)
    deviation = expected * math.sqrt(2 / (4096 - 1))  # of a sample variance of as many Gaussians
    assert float(momenta.var()) == pytest.approx(expected, abs=4 * deviation)


@pytest.mark.parametrize("beta", [0.9, 0.97])
def test_the_variance_of_the_average_is_the_formulas(beta):
    size, replicas = 4096, 4
    average, _ = pure_noise(beta, 8, replicas=replicas, size=size, sigma=2.0, rounds=30, past=0)
    expected = shared_variance(beta, replicas, sigma=2.0)
    assert float(average.square().mean()) == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / size))


@pytest.mark.parametrize("beta, past", [(0.9, 4), (0.97, 4), (0.97, 15)])
def test_mutual_information_is_that_of_the_correlation_measured(beta, past):
    size, replicas = 16384, 2
    average, momenta = pure_noise(beta, 16, replicas=replicas, size=size, sigma=1.0, rounds=12, past=past)
    correlation = float(torch.corrcoef(torch.stack([average, momenta[0]]))[0, 1])
    shared, local = (torch.tensor([[each]]) for each in (shared_variance(beta, replicas), local_variance(beta, past)))
    information = mutual_information(beta, past, shared, local)
    expected = math.sqrt(-math.expm1(-2 * information))  # I = -1/2 log(1 - r^2) of two Gaussians
    assert math.atanh(correlation) == pytest.approx(math.atanh(expected), abs=4 / math.sqrt(size - 3))  # Fisher's z


def test_mutual_information_of_coordinates_that_depend_on_each_other():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    shared, local = a @ a.T, b @ b.T + torch.eye(5)
    total = 0.81 * shared + local  # covariance of u_{t+K}, beta^(2K) = 0.9^2
    expected = 0.5 * (torch.logdet(total) - torch.logdet(local))  # h(u_{t+K}) - h(u_{t+K} | u_t)
    assert mutual_information(0.9, 1, shared, local) == pytest.approx(float(expected))


def drifts(beta: float, beta2: float, rho: float, gradients: torch.Tensor, every: int) -> list[tuple[str, int, float]]:
    """(state, local steps, greatest change of a coordinate since the last average) after every step but those of
    averages."""
    both = {"params": every, "exp_avg": every, "exp_avg_sq": every}
    world = Replicas(
        torch.zeros(gradients.shape[2], dtype=torch.float64),
        config("adam", both, betas=[beta, beta2], clip_value=rho),
        gradients.shape[1],
    )
    found, shared = [], {}
    for step, rows in enumerate(gradients, 1):
        world.step(rows.clone())
        for state in ("exp_avg", "exp_avg_sq"):
            if step % every == 0:
                shared[state] = world.state(state)
            elif state in shared:
                found.append((state, step % every, float((world.state(state) - shared[state]).abs().max())))
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(BETAS, BETAS, st.floats(1e-3, 10.0), st.integers(2, 9), st.integers(0, 2**20))
def test_no_momentum_ever_drifts_beyond_the_bound(beta, beta2, rho, every, seed):
    gradients = (
        3 * rho * torch.randn(4 * every, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    for state, past, drift in drifts(beta, beta2, rho, gradients, every):
        bound = first_momentum_drift(beta, past, rho) if state == "exp_avg" else second_momentum_drift(beta2, past, rho)
        assert drift <= bound * (1 + 1e-9)


def test_a_gradient_that_turns_round_reaches_the_bound():
    rho, every, beta = 0.5, 64, 0.7
    turning = torch.cat([torch.full((every, 2, 1), 9.0), torch.full((8, 2, 1), -9.0)]).double()
    reached = {past: drift for state, past, drift in drifts(beta, 0.99, rho, turning, every) if state == "exp_avg"}
    assert reached == pytest.approx({past: first_momentum_drift(beta, past, rho) for past in range(1, 9)}, rel=1e-6)


def test_psi_by_hand():
    p_x, p_u, beta = 1 / 32, 1 / 96, 0.9
    by_hand = 4 * (1 - p_x) / p_x**2 * (1 - beta) * (1 - p_u) / (1 - (1 - p_u) * beta)
    assert psi(32, [beta], [1.0], [96]) == pytest.approx(by_hand)
    assert psi(1, [beta], [1.0], [96]) == 0  # parameters that always agree
    assert psi(32, [beta], [1.0], [1]) == 0  # a momentum that always agrees
    assert psi(32, [beta], [1.0], [None]) == pytest.approx(4 * (31 / 32) * 32**2)
    assert psi(32, [0.9, 0.99], [0.5, 0.4], [32, 32]) == pytest.approx(
        0.5 * psi(32, [0.9], [1.0], [32]) + 0.4 * psi(32, [0.99], [1.0], [32])
    )


@settings(derandomize=True)
@given(BETAS, st.integers(1, 500), st.integers(1, 500), st.integers(1, 500))
def test_psi_grows_with_every_period_and_falls_with_beta(beta, every, momentum, longer):
    one = psi(every, [beta], [1.0], [momentum])
    assert psi(every + longer, [beta], [1.0], [momentum]) >= one <= psi(every, [beta], [1.0], [momentum + longer])
    assert psi(every, [(1 + beta) / 2], [1.0], [momentum]) <= one * (1 + 1e-12)  # the slower, the less replicas part


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.floats(0.1, 0.9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**20))
def test_sgdm_at_the_proven_rate_comes_down(beta, every, momentum, seed):
    largest = proven_rate(beta, psi(every, [beta], [1.0], [momentum]), smoothness=4.0)
    start, spectrum = torch.ones(6, dtype=torch.float64), torch.logspace(0, math.log10(4), 6)
    goal = Quadratic(start, spectrum, 0.0, replicas=4, heterogeneity=0.5, seed=seed)
    settings_ = config("sgdm", {"params": every, "exp_avg": momentum}, betas=[beta], lr=largest)
    first, steps = float(goal.evaluate(goal.start[None])), math.ceil(4 / largest)
    for moment in simulate(goal, settings_, replicas=4, steps=steps):
        pass
    assert float(goal.evaluate(moment.replicas.state("params").mean(0, keepdim=True))) < 0.05 * first


def test_the_proven_rate_by_hand():
    assert proven_rate(0.9, 0.0, smoothness=2.0) == pytest.approx(0.1 / 8)
    assert proven_rate(0.9, 100.0) == pytest.approx(1 / 60 / 4)
    assert proven_rate(0.9, 100.0, dissimilarity=3.0) == pytest.approx(1 / (60 * math.sqrt(8)) / 4)


def test_what_a_config_remembers():
    params = {
        "sync_every": {"params": 32},
        "momenta": [{"beta": 0.999, "weight": 0.9, "sync_every": 32}],
        "second_moment": {"beta": 0.99, "sync_every": None},
    }
    slow, second = memory(load_config({"optimizer": {"params": params}}).optimizer, replicas=4)
    assert slow.kept == pytest.approx(0.9685, abs=1e-4) and slow.noise == pytest.approx(0.0005 * 0.062, rel=0.02)
    assert slow.information == pytest.approx(0.5 * math.log1p(0.999**64 / (4 * (1 - 0.999**64))))
    assert (second.kept, second.drift, second.information) == (0.0, 2.0, None)
    local_adam = load_config({"optimizer": {"params": {"sync_every": {"params": 32, "exp_avg": 32}}}})
    fast, _ = memory(local_adam.optimizer, replicas=4)
    assert fast.kept == pytest.approx(0.0343, abs=1e-4) and fast.information < slow.information / 1000


def test_a_momentum_that_is_reset_is_local_since_then():
    params = {
        "sync_every": {"params": 8, "exp_avg": None, "exp_avg_sq": None},
        "reset_momenta": True,
        "betas": [0.9, 0.99],
    }
    first, second = memory(load_config({"optimizer": {"params": params}}).optimizer, replicas=4)
    assert first.kept == first.information == 0 and first.noise == pytest.approx(local_variance(0.9, 8))
    assert second.drift == pytest.approx(second_momentum_drift(0.99, 8))


def test_a_period_that_adapts_is_told_at_its_longest():
    def config_of(period, **more):
        every = {"params": 4, "exp_avg": period}
        return load_config({"optimizer": {"params": {"sync_every": every, **more}}}).optimizer

    bounds = {"adaptive": {"min": 4, "max": 16}}
    assert memory(config_of(bounds), replicas=4) == memory(config_of(16), replicas=4)
    assert proven(config_of(bounds, rule="sgdm")) == proven(config_of(16, rule="sgdm"))


def test_what_is_proven_of_a_config():
    des_loc, mt_dao = (
        load_config({"optimizer": {"params": {"rule": "sgdm", "sync_every": {"params": 32}} | params}}).optimizer
        for params in ({"betas": [0.9]}, {"momenta": [{"beta": 0.9, "weight": 0.5}]})
    )
    found = proven(des_loc)
    assert found.psi == pytest.approx(psi(32, [0.9], [1.0], [96])) and found.rate == proven_rate(0.9, found.psi)
    assert proven(mt_dao) == (pytest.approx(found.psi / 2), None)
    assert proven(load_config({"optimizer": {"params": {}}}).optimizer) is None
