"""A noisy quadratic that threads of replicas train on, by DesLoc and by the float64 oracle."""

import torch

from deslo_plugin import DesLoc
from tests.support.oracle import blocks, states, train
from tests.support.worlds import threads

REPLICAS, STEPS, SIZE = 3, 25, 17
MOMENTA = {
    "one": ([0.9], [1.0]),
    "quasi-hyperbolic": ([0.99], [0.7]),
    "two": ([0.9, 0.99], [0.6, 0.4]),
    "two and a rest": ([0.9, 0.99], [0.3, 0.4]),
    "three": ([0.5, 0.9, 0.99], [0.2, 0.3, 0.4]),
    "raw gradient": ([0.9], [0.0]),
}


def noisy_quadratic(replica: int, step: int, x: torch.Tensor) -> torch.Tensor:
    """Gradient of a quadratic with a bowl per replica and noise that is a function of (replica, step) only."""
    generator = torch.Generator().manual_seed(1000 * replica + step)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2.0, x.numel(), dtype=torch.float64).view(x.shape)
    return (scale * (x.double() - replica) + noise).to(x.dtype)


def rare(replica: int, step: int, x: torch.Tensor) -> torch.Tensor:
    """As ``noisy_quadratic``, but every coordinate has its gradient in a fourth of the steps, and on one replica
    never."""
    coordinate = torch.arange(x.numel())
    return noisy_quadratic(replica, step, x) * ((coordinate + step) % 4 == 0) * (coordinate % REPLICAS != replica)


def run_ours(
    s,
    *,
    replicas=REPLICAS,
    steps=STEPS,
    dtype=torch.float64,
    overlap=True,
    gradient=noisy_quadratic,
    synchronous_steps=0,
):
    """The states of every replica after ``steps`` steps of ``DesLoc`` on a vector split over two parameters."""
    config = blocks(
        s,
        overlap_comm=overlap and not s.after_update,
        wire_dtype=str(dtype).removeprefix("torch."),
        bucket_cap_mb=1,
        synchronous_steps=synchronous_steps,
    )

    def replica(average):
        start = torch.linspace(-1, 1, SIZE, dtype=torch.float64).to(dtype)
        shape = (12,) if s.offsets else (3, 4)  # fragments of a vector are cut anywhere, as the oracle cuts
        params = [torch.nn.Parameter(start[:5].clone()), torch.nn.Parameter(start[5:].clone().view(shape))]
        optimizer = DesLoc(params, config, transport=average)
        for step in range(steps):
            flat = torch.cat([p.detach().flatten() for p in params])
            g = gradient(average.rank, step, flat)
            params[0].grad, params[1].grad = g[:5].clone(), g[5:].clone().view(shape)
            if optimizer.averaging.synchronous:
                optimizer.averaging.gradients.average(step + 1, [p.grad for p in params])
            optimizer.step()
        ours = {"params": params} | {
            name: [optimizer.state[p][name] for p in params] for name in optimizer.config.optimizer.moments
        }
        return {name: torch.cat([t.detach().flatten() for t in each]) for name, each in ours.items()}

    return threads(replicas, replica)


def expected(s, *, replicas=REPLICAS, steps=STEPS, gradient=noisy_quadratic, synchronous_steps=0):
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    world = train(
        [s], [start], replicas, steps, lambda m, t, x: [gradient(m, t, x[0])], synchronous_steps=synchronous_steps
    )
    return [states(s, groups[0]) for groups in world]


def assert_equal(ours, theirs, relative):
    for mine, theory in zip(ours, theirs, strict=True):
        assert mine.keys() == theory.keys()
        for name in mine:
            error = (mine[name].double() - theory[name]).abs().max()
            assert error <= relative * theory[name].abs().max().clamp(min=1.0), f"{name}: {error:.3g}"
