"""The arithmetic of benchmarks/slow_link/link.py, on laps that are made up: what is exposed, what the link leaves, what
is planned."""

import pytest

from benchmarks.slow_link.exposure import Segment, lap, row, unsettled
from benchmarks.slow_link.network import WIRE_PER_PAYLOAD

STEP, K = 0.1, 4


def made(index: int, payload: list[int], late: float = 0.0, others: float = 0.0):
    """A lap of two ranks whose steps take 0.1 s, and the last of them ``late`` seconds more."""
    ends = [STEP * (step + 1) for step in range(len(payload))]
    ends[-1] += late
    segment = Segment(0.0, ends, payload, late)
    wire = sum(payload) * WIRE_PER_PAYLOAD
    return lap(index, [segment, segment], [wire, wire], others)


def test_exposed_is_the_mean_over_a_whole_period_of_medians_of_like_laps():
    floor = [made(index, [0, 0]) for index in range(6)]
    laps = [made(index, [0, 1000 * (index % 2)], late=0.04 * (index % 2)) for index in range(6)]
    laps[3] = made(3, [0, 1000], late=5.0)  # a burst, of which there are two quieter ones alike
    result = row("des-loc", laps, floor, hides=False, mbit=None)
    assert result.exposed == pytest.approx(0.04 / (2 * STEP) / 2)
    assert result.bytes == pytest.approx(result.planned) == pytest.approx(250 * WIRE_PER_PAYLOAD)
    assert result.inevitable is None


def test_laps_beside_somebody_elses_work_count_only_where_there_is_no_other():
    floor = [made(index, [0, 0], others=0.5 * (index == 1)) for index in range(3)]
    laps = [made(0, [0, 8]), made(1, [0, 8], late=9.0, others=0.2), made(2, [0, 8], late=9.0, others=0.9)]
    assert row("des-loc", laps, floor, hides=False, mbit=None).exposed == pytest.approx(0)
    assert not unsettled(laps)
    assert unsettled(laps[2:])


@pytest.mark.parametrize("hides, left", [(True, 0.5), (False, 1.5)])
def test_the_link_leaves_what_does_not_fit_under_a_step(hides, left):
    payload = round(1.5 * STEP * 1e6 / 8 / WIRE_PER_PAYLOAD)  # a step and a half at 1 Mbit/s
    floor, laps = [made(0, [0] * K)], [made(0, [payload, 0, 0, 0])]
    assert row("des-loc", laps, floor, hides=hides, mbit=1.0).inevitable == pytest.approx(left / K, rel=1e-3)
