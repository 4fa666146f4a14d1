"""States averaged in fragments, at steps of their own: against the oracle, and what each option does with them."""

from dataclasses import replace
from math import ceil

import pytest
import torch

from deslo_plugin import DesLoc
from deslo_plugin.algorithm.fragments import due_fragments, offsets
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.fragments import Fragments
from tests.support.oracle import Setting, blocks, states, train
from tests.support.quadratic import MOMENTA, SIZE, STEPS, assert_equal, expected, noisy_quadratic, rare, run_ours
from tests.support.theory import cut
from tests.support.worlds import threads

PERIODS = {"x": 3, "u1": 2, "u2": 5, "u3": None, "v": 7}


@pytest.mark.parametrize("count", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("periods", [(32, 96, 192), (32, 32, 32), (13, 35, 693), (5, None, 7)])
def test_each_fragment_is_due_once_in_each_period_and_states_of_one_period_together(periods, count):
    periods = dict(zip("xuv", periods))
    for state, period in periods.items():
        steps = range(1000, 1000 + (period or 10))
        times = [[state in due_fragments(periods, count, step).get(i, ()) for step in steps] for i in range(count)]
        assert [sum(each) for each in times] == [1 if period else 0] * count
    starts = offsets(tuple(periods.items()), count)
    assert all(starts[a] == starts[b] for a in starts for b in starts if periods[a] == periods[b])


def test_one_fragment_is_the_papers_schedule():
    assert offsets((("x", 4), ("u", 12), ("v", None)), 1) == {"x": (0,), "u": (0,)}
    assert due_fragments({"x": 4, "u": 12}, 1, 12) == {0: ("x", "u")}
    assert due_fragments({"x": 4, "u": 12}, 1, 0) == {}


@pytest.mark.parametrize("count, most", [(8, 1), (16, 1), (32, 2)])
def test_fragments_of_all_states_come_as_evenly_as_they_can(count, most):
    """At 32/96/192 a step takes count (1/32 + 1/96 + 1/192) fragments on average."""
    periods = {"x": 32, "u": 96, "v": 192}
    met = [sum(map(len, due_fragments(periods, count, step).values())) for step in range(1, 385)]
    assert max(met) == most == ceil(sum(met) / len(met))


@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize("after_update", [False, True], ids=["before_step", "after_step"])
@pytest.mark.parametrize("momenta", ["one", "two and a rest", "three"])
@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_every_rule_and_order_is_the_oracle_in_float64(rule, momenta, after_update, count):
    s = Setting(rule, PERIODS if rule != "sgdm" else PERIODS | {"u1": 7}, *MOMENTA[momenta], weight_decay=0.1)
    s = cut(replace(s, after_update=after_update), count)
    assert_equal(run_ours(s), expected(s), 1e-12)
    assert_equal(run_ours(s, gradient=rare), expected(s, gradient=rare), 1e-12)


@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_float32_is_the_oracle(rule):
    s = cut(Setting(rule, PERIODS | {"u1": 7}, [0.9, 0.99], [0.5, 0.3], eps=1e-4, lr=1e-3), 3)
    assert_equal(run_ours(s, dtype=torch.float32), expected(s), 1e-6)


@pytest.mark.parametrize("change", [{"delay": 2}, {"delay": 3}, {"outer": (0.7, 0.9)}], ids=str)
@pytest.mark.parametrize("rule", ["adam", "adopt"])
def test_options_are_the_oracle(rule, change):
    s = Setting(rule, {"x": 4, "u1": 3, "u2": 5, "v": 7}, [0.9, 0.99], [0.5, 0.3], weight_decay=0.1)
    s = cut(replace(s, **change), 3)
    assert_equal(run_ours(s), expected(s), 1e-12)


@pytest.mark.parametrize("rule", ["sgdm", "adam", "adopt"])
def test_overlap_changes_no_bit(rule):
    s = cut(Setting(rule, PERIODS | {"u1": 7}, [0.9, 0.99], [0.5, 0.3]), 3)
    for ours, theirs in zip(run_ours(s, dtype=torch.float32), run_ours(s, dtype=torch.float32, overlap=False)):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_as_many_fragments_as_parameters_that_are_equal_everywhere_are_one_replica():
    s, same = cut(Setting("adam", PERIODS, [0.9], [1.0]), 3), lambda replica, step, x: noisy_quadratic(0, step, x)
    (alone,) = run_ours(replace(s, offsets={}), replicas=1, gradient=same)
    for replica in run_ours(s, replicas=2, gradient=same):
        assert all(torch.allclose(replica[name], alone[name], rtol=1e-13, atol=1e-15) for name in alone)


def test_replicas_are_weighed_by_what_they_saw_since_that_fragment_was_averaged():
    seen = lambda replica, step: (1 + replica) * (2 + step % 3)
    s = cut(Setting("adam", {"x": 3, "u1": 5, "v": 7}, [0.9], [1.0]), 3)
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    world = train([s], [start], 3, STEPS, lambda m, t, x: [noisy_quadratic(m, t, x[0])], samples=seen)

    def replica(average):
        (p,) = params = [torch.nn.Parameter(start.clone())]
        config = blocks(s, wire_dtype="float64", replica_weights="samples")
        optimizer = DesLoc(params, config, transport=average)
        for step in range(STEPS):
            p.grad = noisy_quadratic(average.rank, step, p.detach())
            optimizer.averaging.samples.record_samples(seen(average.rank, step))
            optimizer.step()
        state = optimizer.state[p]
        return {"params": p.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    assert_equal(threads(3, replica), [states(s, groups[0]) for groups in world], 1e-12)


SHAPES = {
    "matrices and vectors": [(7, 3), (5,), (), (1, 9), (0, 4), (16, 2, 2)],
    "one flat partition": [(101,)],
    "smaller than the fragments": [(2,)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_element_is_in_one_fragment_and_fragments_differ_by_a_row(name):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES[name]]
    if name == "matrices and vectors":
        params.append(torch.nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)))
    fragments, cohort = Fragments(4), Cohort(1, {"params": params}, params, {"params": 4})
    with torch.no_grad():
        for index in range(4):
            part = fragments.of(cohort, index)
            for tensor in part.parts(part.params):
                tensor += index + 1
    counts = torch.cat([param.detach().flatten() for param in params]).long().bincount(minlength=5)
    assert counts[0] == 0 and counts.sum() == sum(param.numel() for param in params)
    assert [sum(parts) for parts in fragments.numels(cohort)] == counts[1:].tolist()
    row = max(param.numel() // max(1, len(param)) if param.dim() else 1 for param in params)
    assert counts[1:].max() - counts[1:].min() <= 2 * row


def test_a_state_with_other_rows_than_its_parameter_travels_once():
    """Adafactor's column statistics have as many elements as the matrix has columns."""
    param = torch.nn.Parameter(torch.zeros(8, 5))
    fragments, cohort = Fragments(4), Cohort(1, {"params": [param]}, [param], {"params": 4})
    for other in (torch.zeros(5), torch.zeros(())):
        parts = [fragments.of(cohort, index).parts([other])[0] for index in range(4)]
        assert [part.numel() for part in parts] == [other.numel(), 0, 0, 0]
        parts[0].fill_(1.0)
        assert other.min() == 1.0
