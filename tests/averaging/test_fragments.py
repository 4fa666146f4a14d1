"""States averaged in fragments, at steps of their own: against the oracle, and what each option does with them."""

from dataclasses import replace
from math import ceil

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc, load_config
from deslo_plugin.algorithm.fragments import due_fragments, offsets
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.fragments import Fragments
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.planning.forecast import Link, forecast, memory, transfers
from deslo_plugin.planning.plan import make_plan
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
        optimizer = DesLoc(params, config, average=average)
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
    assert fragments.numels(cohort) == counts[1:].tolist()
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


def settings(fragments, delay=1, periods=(4, 4, 8), **deslo):
    every = dict(zip(("params", "exp_avg", "exp_avg_sq"), periods))
    return {
        "optimizer": {"params": {"lr": 1e-2, "sync_every": every}},
        "deslo": {"fragments": fragments, "sync_delay": delay, **deslo},
    }


def params_of(rank):
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((9, 3), (4,), ())]


def take_steps(optimizer, params, steps, rank):
    for step in steps:
        for index, param in enumerate(params):
            generator = torch.Generator().manual_seed(1000 * rank + 10 * step + index)
            param.grad = torch.randn(param.shape, generator=generator) if param.requires_grad else None
        optimizer.step()


@pytest.mark.parametrize("fragments", [1, 3, "auto"])
@pytest.mark.parametrize("deslo", [{}, {"replica_weights": "samples"}], ids=str)
def test_bytes_are_as_planned_at_every_step(fragments, deslo):
    def replica(average):
        events = []
        optimizer = DesLoc(
            params := params_of(0), settings(fragments, **deslo), average=average, on_average=events.append
        )
        for step in range(24):
            if deslo:
                optimizer.averaging.samples.record_samples(1.0)
            take_steps(optimizer, params, [step], average.rank)
        averaging = optimizer.averaging
        cuts = [averaging.fragments.numels(Cohort(0, group, group["params"], {})) for group in averaging.groups]
        numels, periods = [32], [group["sync_every"] for group in optimizer.param_groups]
        plan = make_plan(optimizer.config, numels, periods, contiguous(2, 0, 1), cuts=cuts)
        for step in range(1, 24):
            sent = {}
            for event in (each for each in events if each.steps == step):
                sent = {state: sent.get(state, 0) + event.bytes.get(state, 0) for state in {**sent, **event.bytes}}
            assert sent == plan.bytes_at(step), step
        return True

    assert all(threads(2, replica))


def test_peaks_fall_to_a_fragment():
    def plan(fragments, delay=1):
        config = load_config(settings(fragments, delay, periods=(32, 96, 192)))
        return make_plan(config, [64_000], [config.optimizer.periods], contiguous(4, 0, 1))

    burst, streamed = plan(1), plan(8)
    assert streamed.peak_bytes == burst.peak_bytes / 24  # one fragment of one state, where all of three met
    assert plan(8, delay=4).flight_bytes == 2 * 3 * streamed.peak_bytes  # one of each state in any 4 steps
    each = [transfers(one, 384) for one in (burst, streamed)]
    sent = [sum(sum(transfer.bytes.values()) for transfer in moved) for moved in each]
    assert sent[1] == pytest.approx(sent[0], rel=0.02)
    assert (
        max(sum(transfer.bytes.values()) for transfer in each[1])
        < 1.1 * max(sum(transfer.bytes.values()) for transfer in each[0]) / 24
    )
    assert memory(streamed, each[1]).in_flight == streamed.flight_bytes

    link = Link(gbit_per_s=0.01)
    waited = [forecast(one, link, 0.1, 384).exposed_s for one in (burst, streamed)]
    assert waited[0] > 0 and waited[1] == 0


@pytest.mark.parametrize("delay", [1, 3])
def test_a_resume_in_the_middle_changes_no_bit(delay):
    def replica(average, resume_at=None):
        optimizer = DesLoc(params := params_of(0), settings(3, delay), average=average)
        take_steps(optimizer, params, range(resume_at or 20), average.rank)
        if resume_at:
            saved, aside = optimizer.state_dict(), optimizer.averaging.get_extra_state()
            values = [param.detach().clone() for param in params]
            optimizer = DesLoc(params := params_of(0), settings(3, delay), average=average)
            with torch.no_grad():
                for param, value in zip(params, values):
                    param.copy_(value)
            optimizer.load_state_dict(saved)
            optimizer.averaging.set_extra_state(aside)
            take_steps(optimizer, params, range(resume_at, 20), average.rank)
        return [param.detach() for param in params], [optimizer.state[param]["exp_avg"] for param in params]

    whole = threads(2, replica)
    for resume_at in (5, 6, 7):
        resumed = threads(2, lambda average, at=resume_at: replica(average, at))
        for ours, theirs in zip(whole, resumed):
            assert all(torch.equal(a, b) for mine, other in zip(ours, theirs) for a, b in zip(mine, other))


def test_a_checkpoint_of_other_fragments_under_way_is_refused():
    def replica(average):
        optimizer = DesLoc(params := params_of(0), settings(3, delay=3), average=average)
        take_steps(optimizer, params, range(5), average.rank)
        aside = optimizer.averaging.get_extra_state()
        assert aside["late"]["parts"]
        other = DesLoc(params, settings(2, delay=3), average=average)
        take_steps(other, params, range(1), average.rank)
        with pytest.raises(ConfigError, match="deslo.fragments: expected 3, in which averages of the checkpoint"):
            other.averaging.set_extra_state(aside)

    threads(2, replica)


@pytest.mark.parametrize("delay", [1, 2])
def test_what_is_frozen_between_fragments_is_equal_everywhere_before_it_leaves(delay):
    def replica(average):
        optimizer = DesLoc(params := params_of(0), settings(4, delay), average=average)
        take_steps(optimizer, params, range(10), average.rank)
        params[0].requires_grad_(False)
        params[0].grad = None
        take_steps(optimizer, params, range(10, 20), average.rank)
        return params[0].detach()

    first, *others = threads(2, replica)
    assert all(torch.equal(first, other) for other in others)


BAD = {
    "more than the longest period has steps": (settings(9), "deslo.fragments: expected at most 8, the longest period"),
    "not a number": (settings(2.5), "deslo.fragments"),
    "none": (settings(0), "deslo.fragments"),
    "the last average": (settings(2, state_dict="last_average"), 'expected 1 with state_dict "last_average"'),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused(name):
    config, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        load_config(config)


def test_options_of_the_optimizer_that_fragments_exclude():
    params = {"sync_every": {"params": 4, "exp_avg": None, "exp_avg_sq": None}, "reset_momenta": True}
    with pytest.raises(ConfigError, match="deslo.fragments: expected 1 with reset_momenta"):
        load_config({"optimizer": {"params": params}, "deslo": {"fragments": 2}})
    params = {"sync_every": {"params": 4, "exp_avg": "adaptive", "exp_avg_sq": 8}}
    with pytest.raises(ConfigError, match="deslo.fragments: expected 1 with an adaptive period of exp_avg"):
        load_config({"optimizer": {"params": params}, "deslo": {"fragments": 2}})


def test_auto_is_the_shortest_period():
    assert load_config(settings("auto")).deslo.fragments == 4
    stock = {"deslo": {"fragments": "auto", "sync_every": {"params": 16, "exp_avg": 6}}}
    assert load_config(stock).deslo.fragments == 6
