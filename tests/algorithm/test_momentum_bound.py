"""How large a momentum may be beside the root of Adam's second moment, whatever is averaged when."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deslo_plugin
from deslo_plugin import DesLoc
from tests.support import torch_jobs
from tests.support.oracle import Setting, blocks, states, train
from tests.support.quadratic import assert_equal
from tests.support.theory import RULES
from tests.support.worlds import threads


@st.composite
def schedules(draw):
    count = draw(st.integers(1, 3))
    beta = st.sampled_from([0.0, 0.5, 0.9, 0.97, 0.99])
    every = {key: draw(st.sampled_from([None, 2, 3, 4, 5])) for key in ["v", *(f"u{j + 1}" for j in range(count))]}
    delay = draw(st.sampled_from([1, 1, 2]))
    return Setting(
        "adam",
        {"x": draw(st.sampled_from([2, 3, 4])), **every},
        draw(st.lists(beta, min_size=count, max_size=count)),
        [draw(st.sampled_from([0.0, 0.3, 1.0])) / count for _ in range(count)],
        beta2=draw(st.sampled_from([0.5, 0.9, 0.95, 0.999])),
        delay=delay,
        after_update=delay == 1 and draw(st.booleans()),
        bias_correction=draw(st.booleans()),
        outer=(0.7, 0.9) if delay == 1 and draw(st.booleans()) else None,
    )


def largest_ratio(s, t):
    """The largest |u_j| / sqrt(v) that Adam alone could have after t steps, for each momentum."""
    for beta in s.betas:
        ratio = beta**2 / s.beta2
        powers = 1 / (1 - ratio) if ratio < 1 else sum(ratio**i for i in range(t))
        yield (1 - beta) * math.sqrt(powers / (1 - s.beta2))


@given(s=schedules(), seed=st.integers(0, 2**20), weighted=st.booleans(), warm_up=st.sampled_from([0, 3]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_momentum_is_ever_larger_than_an_adam_alone_could_have_it(s, seed, weighted, warm_up):
    """After every step, at any periods, betas, weights of replicas, delay and order; and all is as the oracle has
    it."""
    steps, size = 14, 12
    seen = lambda m, t: float(1 + (seed + 3 * m + t) % 4) if weighted else 1.0

    def gradient(m, t):
        generator = torch.Generator().manual_seed(1000 * seed + 100 * m + t)
        dense, chance = (
            torch.randn(size, generator=generator, dtype=torch.float64),
            torch.rand(size, generator=generator),
        )
        rare = dense * 10 ** (3 * torch.randn(size, generator=generator)) * (chance < 0.3)
        return rare * (torch.arange(size) % 3 != m)

    def mean_in_warm_up(m, t):
        return sum(gradient(each, t) for each in range(2)) / 2 if t < warm_up else gradient(m, t)

    config = blocks(
        s,
        wire_dtype="float64",
        replica_weights="samples" if weighted else "uniform",
        synchronous_steps=warm_up,
        **({} if s.after_update else {"overlap_comm": True}),
    )

    def replica(average):
        (p,) = params = [nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))]
        optimizer = DesLoc(params, config, transport=average)
        for t in range(steps):
            p.grad = mean_in_warm_up(average.rank, t)
            if weighted:
                optimizer.averaging.samples.record_samples(seen(average.rank, t))
            optimizer.step()
            state = optimizer.state[p]
            for name, ratio in zip(optimizer.config.optimizer.momenta, largest_ratio(s, t + 1)):
                assert (state[name].abs() <= ratio * state["exp_avg_sq"].sqrt() * (1 + 1e-9)).all(), (name, t)
        return {"params": p.detach()} | {name: optimizer.state[p][name] for name in optimizer.config.optimizer.moments}

    start = torch.linspace(-1, 1, size, dtype=torch.float64)
    theory = train(
        [s],
        [start],
        2,
        steps,
        lambda m, t, x: [gradient(m, t)],
        synchronous_steps=warm_up,
        samples=seen if weighted else None,
    )
    assert_equal(threads(2, replica), [states(s, groups[0]) for groups in theory], 1e-9)


def excess(blocks_of_job, steps):
    """How far momenta are above what v allows after ``steps`` steps and ``sync_replicas``, and after a save and a load
    of it."""
    model, optimizer, _ = torch_jobs.attached("plain", blocks_of_job)
    torch_jobs.train(model, optimizer, range(steps))
    deslo_plugin.sync_replicas(model)
    most = 0.1 / math.sqrt(0.05 * (1 - 0.81 / 0.95))
    return max(
        float((optimizer.state[p]["exp_avg"].abs() - most * optimizer.state[p]["exp_avg_sq"].sqrt()).max())
        for p in model.parameters()
    )


def test_meeting_keeps_it_because_both_are_averaged(four):
    assert max(four().run(excess, blocks(RULES["des-loc-adam"]), 13)) <= 1e-7
