"""What scripts do between steps, in any order: replicas stay with a float64 oracle, or every rank says why not.

A sequence is drawn, played on four real ranks, and played again by ``Oracle``, which knows Adam, periods and means and
imports nothing of the package.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.sequence_jobs import RANKS, played, replica_of
from tests.support.sequence_oracle import Oracle, apart

# What a script may do between steps. ``who`` is a rank, or None for all of them.
RANK = st.integers(0, RANKS - 1)
ON_ALL = st.one_of(
    st.tuples(st.just("train"), st.sampled_from(["plain", "clipped", "uneven", "evaluated"])),
    st.tuples(st.just("train"), st.just("plain")),
    st.tuples(st.just("skip"), RANK),
    st.tuples(st.just("write"), st.sampled_from(["add", "clamp", "rows"]), st.one_of(st.none(), RANK)),
    st.tuples(st.just("freeze")),
    st.tuples(st.just("join")),
    st.tuples(st.just("keep")),
    st.tuples(st.just("go back")),
    st.tuples(st.just("save and load"), st.sampled_from(["averaged", "per_replica", "synchronized"])),
    st.tuples(st.just("average now")),
)
SETTINGS = st.sampled_from(
    [
        ({"params": 2, "exp_avg": 4, "exp_avg_sq": 4}, {}),
        ({"params": 3, "exp_avg": 3, "exp_avg_sq": 3}, {"overlap_comm": False}),
        ({"params": 1, "exp_avg": 2, "exp_avg_sq": 2}, {"average_at": "after_step"}),
        ({"params": 4, "exp_avg": None, "exp_avg_sq": None}, {}),
        ({"params": 2, "exp_avg": 2, "exp_avg_sq": 2}, {"bucket_cap_mb": 1}),
    ]
)


@contextmanager
def folder() -> Iterator[str]:
    path = tempfile.mkdtemp()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


LIMIT = 300  # seconds of one sequence: only against a hang
FEW = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("wrap, stock", [("plain", False), ("plain", True), ("ddp", False), ("fsdp", False)])
def test_any_sequence_on_all_ranks_ends_where_the_oracle_does(four, wrap, stock):
    # torch's own limit
    actions = ON_ALL if wrap != "fsdp" else ON_ALL.filter(lambda action: action[0] not in ("freeze", "join"))

    @FEW
    @given(SETTINGS, st.lists(actions, min_size=6, max_size=14))
    def holds(setting, sequence):
        periods, deslo = setting
        with folder() as path:
            results = four().run(played, wrap, stock, periods, deslo, sequence, path, timeout=LIMIT)
        replicas = 2 if wrap == "fsdp" else RANKS
        oracle = Oracle(replicas, periods, deslo, stock)
        for action in sequence:
            oracle.play(action)
        for rank, (error, states) in enumerate(results):
            assert not error, (rank, error, sequence)
            expected = oracle.state[replica_of(rank, replicas)]
            for name, value in states.items():
                state, param = name.split(" of ")
                if state != "params" and param in oracle.frozen:
                    continue  # momenta of a frozen parameter are nobody's concern
                assert apart(value, expected[state][param]) <= 1e-4, (rank, name, setting, sequence)

    holds()
