"""Mistakes of DDP, FSDP2 and plain users: refused on every rank with what to do, or detected; never a hang."""

import re

import pytest

from tests.support import torch_error_jobs
from tests.support import torch_jobs as jobs
from tests.support.oracle import blocks
from tests.support.theory import RULES

S = RULES["des-loc-adam"]


@pytest.mark.parametrize(
    "wrap, deslo, options, message",
    [
        ("fsdp of the world", {}, {}, "sharded over all 4 ranks; shard it on one dimension of a 2-D mesh"),
        (
            "fsdp",
            {},
            {"names": ("nodes", "shard")},
            "expected a dimension named replicate or dp_replicate, got .*nodes",
        ),
        ("fsdp", {"replica_size": 4}, {}, "deslo.replica_size: expected 2, as the model and its mesh have it, got 4"),
        (
            "plain",
            {"replica_size": 2},
            {},
            "expected 1, as the model and its mesh have it, got 2; remove it, or wrap the model",
        ),
        ("ddp", {"replica_size": 3}, {}, "expected a divisor of the world size 4, got 3; use one of 1, 2, 4"),
        ("ddp", {}, {}, "expected a number of ranks when all ranks are on one node"),
        (
            "ddp",
            {"replica_size": 2},
            {"find_unused_parameters": True},
            "DDP over the ranks of one replica.*new_subgroups",
        ),
        ("ddp with a hook", {"replica_size": 1}, {}, "a DDP model without a communication hook.*attach once"),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(four, wrap, deslo, options, message):
    for error in four().run(jobs.raises, wrap, blocks(S, **deslo), 0, options):
        assert re.search(f"ConfigError: .*{message}", error)


def test_torch_that_moved_its_internals_is_named(four):
    for error in four().run(torch_error_jobs.moved_internals, blocks(S)):
        assert "expected FSDP2 as in torch 2.13" in error and 'fully_shard(model, mesh=mesh["shard"])' in error


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("attached twice", "one call for each optimizer"),
        ("not attached", "attach.model, optimizer. before the first step"),
        ("config twice", "none beside a DesLoc, which has its own"),
        ("no schedule", "a config with deslo.sync_every for AdamW"),
        ("DesLoc config", "build DesLoc.params, config."),
        (
            "different config",
            "attach's deslo.average_at: expected before_step on every rank.*got after_step on rank.s. .3.",
        ),
        (
            "config of one rank",
            "attach's error: expected .* on every rank, as on rank 0.*none beside a DesLoc.*on rank.s. .3.",
        ),
        ("different lr", "optimizer param group 0.lr: expected 0.01 on every rank.*got 0.02 on rank.s. .3."),
        ("different model", "model parameter 2.weight: expected .3, 8."),
    ],
)
def test_mistakes_in_calling_attach_are_named_on_every_rank(four, mistake, message):
    for error in four().run(torch_error_jobs.misused, mistake, blocks(S)):
        assert re.search(f"ConfigError: .*{message}", error), error


def test_a_rank_that_takes_fewer_steps_is_named_by_the_ranks_that_wait_for_it(four):
    """Rank 3 leaves the loop one step before an average is due."""
    config = blocks(S, timeout_s=2.0)
    outcomes = four().outcomes(torch_error_jobs.fewer_steps, config)
    assert outcomes[3] == "left"
    for error in outcomes[:3]:
        assert re.search(
            r"AverageError: .*expected ranks \[0, 1, 2, 3\] to answer within 2 s.*; rank 3 has not come to it", error
        )


def test_nan_of_one_replica_stops_every_replica_before_it_is_averaged(four):
    for message, finite in four().run(torch_error_jobs.poisoned, blocks(S), 1):
        assert re.search(r"NonFiniteError: average of .* got NaN or inf from rank\(s\) \[1\]", message)
