"""Parallelism inside a replica: each local shard averages with its peer, and the ranks of a replica stay one model."""

import pytest

from tests.support import parallel_jobs as jobs
from tests.support.oracle import blocks
from tests.support.theory import RULES

S, STEPS = RULES["mt-dao-adam-n2"], 14


def assert_replicas(results: list[dict], theory: list[dict]) -> None:
    """Every rank holds what the oracle has of its replica, as far as it holds it, and sends what was planned."""
    for rank, result in enumerate(results):
        for state, tensors in result["states"].items():
            for name, own in tensors.items():
                error = (own.double() - theory[rank * len(theory) // len(results)][state][name]).abs().max()
                assert error <= 1e-5, f"rank {rank}, {state} of {name}: {error:.3g}"
        assert result["bytes"] == result["planned"]


KINDS = {  # what a replica's ranks share -> data-parallel ranks of a replica, the whole model
    "left out of fsdp": (2, jobs.net),
    "left out of hsdp": (2, jobs.net),
    "replicate x tp": (1, jobs.net),
    "pipeline": (1, jobs.net),
    "expert parallel": (2, jobs.moe),
    "context parallel": (1, jobs.attention),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_that_shares_its_model_trains_as_the_oracle(four, kind):
    """Parameters that fully_shard has not got, norms whose gradients torch leaves as partial sums, stages, experts."""
    seats, whole = KINDS[kind]
    assert_replicas(four().run(jobs.run, kind, blocks(S), STEPS), jobs.theory(S, STEPS, seats, build=whole))
