"""What simulated replicas train: noise of their own, bowls that lie apart, networks."""

import pytest
import torch
from torch import nn

from deslo_plugin.simulation import Logistic, Network, Quadratic, Rosenbrock


def test_noise_is_the_replicas_own_whoever_else_is_there():
    objectives = [
        Rosenbrock(torch.zeros(2), replicas=5),
        Quadratic(torch.zeros(20), torch.ones(20), replicas=5, heterogeneity=1.0),
        Logistic(torch.ones(6), batch=8, replicas=5, heterogeneity=1.0),
    ]
    for objective in objectives:

        def gradients(replicas, step):
            x = objective.start.expand(len(replicas), -1).clone().requires_grad_()
            return torch.autograd.grad(objective.losses(x, replicas, step).sum(), x)[0]

        everyone = gradients([0, 1, 2, 3, 4], 3)
        assert torch.allclose(gradients([4, 1], 3), everyone[[4, 1]], atol=1e-6)
        assert not torch.allclose(everyone[0], everyone[1]) and not torch.allclose(gradients([0], 4)[0], everyone[0])


def test_noise_has_the_deviation_asked_for_and_no_bias():
    objective = Rosenbrock(torch.ones(2, dtype=torch.float64), torch.tensor([0.5, 2.0]), replicas=2)
    x = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)  # the minimum: all that is left is noise
    draws = torch.stack([torch.autograd.grad(objective.losses(x, [0, 1], t).sum(), x)[0] for t in range(2000)])
    assert torch.allclose(draws.std((0, 2)), torch.tensor([0.5, 2.0], dtype=torch.float64), rtol=0.05)
    assert draws.mean((0, 2)).abs().max() < 0.1


def test_bowls_that_lie_apart_have_their_common_minimum_at_zero():
    objective = Quadratic(
        torch.zeros(3, dtype=torch.float64), torch.tensor([0.1, 1.0, 10.0]), 0.0, replicas=4, heterogeneity=2.0
    )
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(objective.losses(x, range(4), 0).sum(), x)
    assert slopes.abs().min() > 1e-3 and slopes.sum(0).abs().max() < 1e-12


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_network_gives_each_replica_the_gradient_of_its_own_batch(vectorised):
    torch.manual_seed(0)

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, inputs, targets):
            return (self.net(inputs) - targets).square().mean()

    model, generator = Regression(), torch.Generator().manual_seed(1)
    data = torch.randn(3, 5, 3, generator=generator), torch.randn(3, 5, 1, generator=generator)
    batches, held_out = lambda replicas, step: [each[replicas] for each in data], [[each[0] for each in data]]
    objective = Network(model, batches, held_out, vectorised=vectorised)
    x = objective.start.expand(2, -1).clone().requires_grad_()
    losses = objective.losses(x, [2, 0], 0)
    (slopes,) = torch.autograd.grad(losses.sum(), x)
    for row, replica in enumerate([2, 0]):
        loss = model(*(each[replica] for each in data))
        own = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert torch.allclose(losses[row], loss) and torch.allclose(slopes[row], own, atol=1e-6)
    assert torch.allclose(objective.evaluate(x.detach())[0], model(*(each[0] for each in data)))


def test_a_network_of_several_dtypes_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="one dtype"):
        Network(model, lambda replicas, step: (), [])
