"""What the planner says would let training wait less: fragments, longer periods."""

import pytest

from deslo_plugin import load_config
from deslo_plugin.planning.advice import Reach, hiding_fragments, reach
from deslo_plugin.planning.alternatives import in_fragments, most_fragments
from deslo_plugin.planning.comparison import IN_FRAGMENTS, Job, methods
from deslo_plugin.planning.forecast import Link, forecast
from tests.support.command_line import answer, run

EVERY = {"params": 32, "exp_avg": 96, "exp_avg_sq": 192}


def job(every=EVERY, deslo=None, numel=1_300_000_000):
    """On 4 replicas, in steps of 0.9 s; a copy of 1.3 billion parameters takes 6.24 s at 10 Gbit/s."""
    config = load_config({"optimizer": {"params": {"sync_every": every}}, "deslo": deslo or {}})
    return Job(config, numel, 4, 1, 0.9, 2000)


@pytest.mark.parametrize("gbps, count", [(10, 8), (40, 2), (5, 16), (1000, 1), (0.1, None)])
def test_as_few_fragments_as_let_each_fit_under_a_step(gbps, count):
    """A fragment of one state takes 6.24 s x 10 / gbps / count, and two of different states never meet at these."""
    found = hiding_fragments(job(), Link(gbps))
    assert found == count
    if count and count > 1:
        for fragments, waits in ((count, False), (count // 2, True)):
            plan = job().plan(in_fragments(job().config, fragments))
            assert (forecast(plan, Link(gbps), 0.9, 2000).exposed_s > 0) == waits


def test_the_latency_of_the_word_that_averages_may_land_is_waited_for_at_each():
    link = Link(1e6, latency_s=0.01)
    seen = {method.name: method.on(link) for method in methods(job(numel=1000))}
    assert seen["this config"].exposed_s == pytest.approx(62 * 0.01)  # averages at 32, 64, ... landed before step 2,000
    assert seen[IN_FRAGMENTS].exposed_s == pytest.approx(1998 * 0.01, rel=0.01)


def test_a_target_takes_the_shortest_periods_and_then_the_fewest_fragments():
    assert reach(job(), Link(10), 0.7) == Reach(1, 1, pytest.approx(0.774, abs=0.03))
    assert reach(job(), Link(10), 0.99) == Reach(1, 8, 1.0)
    slow = reach(job(), Link(1), 0.95)
    assert slow.stretch == 2 and slow.few_bits and slow.utilisation > 0.95  # in float32 5 s of 0.9 s would be busy
    assert reach(job(deslo={"wire_dtype": {"params": "bfloat16"}}), Link(1), 0.95).few_bits is False  # it has chosen
    assert reach(job(), Link(1e-4), 0.95) is None


@pytest.mark.parametrize(
    "deslo, every",
    [
        ({"average_at": "after_step"}, EVERY),
        ({"fragments": 4}, EVERY),
        ({"state_dict": "last_average"}, EVERY),
        ({}, {"params": 32, "exp_avg": "adaptive", "exp_avg_sq": 192}),
    ],
)
def test_nothing_is_recommended_that_cannot_be_set(deslo, every):
    planned = job(every, deslo)
    assert most_fragments(planned.config) == 1 and hiding_fragments(planned, Link(10)) is None
    assert IN_FRAGMENTS not in [method.name for method in methods(planned)]


def test_the_command_says_what_reaches_a_target():
    options = "plan --params 1.3B --replicas 4 --replica-size 1 --gbps 10 --step-ms 900 --steps 2000".split()
    told = " ".join(run(*options, "--target", "95%").output.split())
    assert '"fragments": 8 would hide it all' in told and 'with "fragments": 8 (100.0%)' in told
    plan = answer(*options, "--target", "0.95")
    assert plan["target"] == {"periods": EVERY, "fragments": 8, "utilisation": 1.0, "wire_dtype": "float32"}
    assert plan["hiding_fragments"] == 8


@pytest.mark.parametrize("target", ["95", "0", "fast"])
def test_a_target_that_is_no_share_is_refused(target):
    options = "plan --params 1B --replicas 4 --replica-size 1 --gbps 10 --step-ms 900 --target".split()
    told = run(*options, target, status=2).output
    assert "--target: expected a share in (0, 1], such as 95% or 0.95" in " ".join(told.split())
