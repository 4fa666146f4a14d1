"""States in fragments: the bytes and the peaks of the plan, resumes, freezing, and what cannot be meant."""

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc, attach, load_config
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.planning.forecast import Link, forecast, memory, transfers
from deslo_plugin.planning.plan import make_plan
from tests.support.worlds import threads


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
            params := params_of(0), settings(fragments, **deslo), transport=average, on_average=events.append
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
        optimizer = DesLoc(params := params_of(0), settings(3, delay), transport=average)
        take_steps(optimizer, params, range(resume_at or 20), average.rank)
        if resume_at:
            saved, aside = optimizer.state_dict(), optimizer.averaging.get_extra_state()
            values = [param.detach().clone() for param in params]
            optimizer = DesLoc(params := params_of(0), settings(3, delay), transport=average)
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
        optimizer = DesLoc(params := params_of(0), settings(3, delay=3), transport=average)
        take_steps(optimizer, params, range(5), average.rank)
        aside = optimizer.averaging.get_extra_state()
        assert aside["late"]["parts"]
        other = DesLoc(params, settings(2, delay=3), transport=average)
        take_steps(other, params, range(1), average.rank)
        with pytest.raises(ConfigError, match="deslo.fragments: expected 3, in which averages of the checkpoint"):
            other.averaging.set_extra_state(aside)

    threads(2, replica)


@pytest.mark.parametrize("delay", [1, 2])
def test_what_is_frozen_between_fragments_is_equal_everywhere_before_it_leaves(delay):
    def replica(average):
        optimizer = DesLoc(params := params_of(0), settings(4, delay), transport=average)
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


def test_more_fragments_than_elements_are_refused():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    config = {"deslo": {"fragments": 4, "sync_every": {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}}}
    with pytest.raises(ConfigError, match="deslo.fragments: expected at most 2, as many as a rank has elements, got 4"):
        attach(model, optimizer, config)


def test_auto_is_the_shortest_period():
    assert load_config(settings("auto")).deslo.fragments == 4
    stock = {"deslo": {"fragments": "auto", "sync_every": {"params": 16, "exp_avg": 6}}}
    assert load_config(stock).deslo.fragments == 6
