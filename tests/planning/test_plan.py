"""Topology, traffic and half-lives: figures that need no process group."""

import itertools
import re

import pytest
import torch

from deslo_plugin import ConfigError, load_config
from deslo_plugin.algorithm.schedule import due, half_life, vectors_per_step
from deslo_plugin.comm.buckets import pack
from deslo_plugin.comm.topology import contiguous, make_topology, spread
from deslo_plugin.planning.plan import make_plan


def plan(params=None, numel=1000, replica_size=2, world=4, divisor=1):
    config = load_config({"optimizer": {"params": params or {}}, "deslo": {"replica_size": replica_size}})
    return make_plan(config, [numel], [config.optimizer.periods], contiguous(world, 0, replica_size), divisor=divisor)


def test_published_half_lives():
    published = {0.9: 6.6, 0.95: 13.5, 0.99: 69, 0.999: 692.8, 0.9999: 6931}
    assert all(half_life(beta) == pytest.approx(tau, rel=5e-3) for beta, tau in published.items())


def test_published_traffic():
    des_loc = {"params": 256, "exp_avg": 768, "exp_avg_sq": 1536}
    local_adam = dict.fromkeys(des_loc, 256)
    assert 1 / vectors_per_step(des_loc) == pytest.approx(170.7, abs=0.05)
    assert 1 / vectors_per_step(local_adam) == pytest.approx(85.3, abs=0.05)
    assert 1 / vectors_per_step(dict.fromkeys(des_loc, 32)) == pytest.approx(10.7, abs=0.05)


def test_nothing_is_due_before_the_first_step_and_null_is_never():
    periods = {"params": 2, "exp_avg": None, "exp_avg_sq": 3}
    assert [due(periods, t) for t in range(7)] == [
        (),
        (),
        ("params",),
        ("exp_avg_sq",),
        ("params",),
        (),
        ("params", "exp_avg_sq"),
    ]


def test_ranks_fall_into_replicas_and_columns():
    worlds = [contiguous(6, rank, 2) for rank in range(6)]
    assert [t.shard_group for t in worlds] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert [t.replica_group for t in worlds] == [[0, 2, 4], [1, 3, 5]] * 3


@pytest.mark.parametrize(
    "replica_size, hosts, complaint",
    [
        (2, "aabb", None),
        (4, "aabb", None),
        (1, "abab", None),
        (2, "abab", "replica 0 .ranks .0, 1.. lies on 2 nodes .a, b. where 1 would do"),
        (2, "aaabbb", "replica 1 .ranks .2, 3.. lies on 2 nodes"),
    ],
)
def test_a_replica_that_lies_on_more_nodes_than_it_needs_is_said(replica_size, hosts, complaint):
    found = spread(contiguous(len(hosts), 0, replica_size), list(hosts))
    assert re.search(complaint, found) if complaint else found is None


def test_auto_is_a_replica_per_node():
    deslo = load_config({}).deslo
    assert make_topology(deslo, world_size=16, rank=9, local_world_size=8).replica_size == 8
    with pytest.raises(ConfigError, match="a number of ranks when all ranks are on one node"):
        make_topology(deslo, world_size=8, rank=0, local_world_size=8)


def test_planned_bytes_and_next_average():
    p = plan({"sync_every": {"params": 4, "exp_avg": 8, "exp_avg_sq": None}})
    assert p.bytes_at(4) == {"params": 4004} and p.bytes_at(8) == {"params": 4004, "exp_avg": 4000}
    assert p.next_sync(0) == (4, ("params",)) and p.next_sync(6) == (2, ("params", "exp_avg"))
    assert plan(numel=1001, divisor=2).bytes_at(32) == {"params": 501 * 4 + 4}


@pytest.mark.parametrize(
    "rule, betas, warned",
    [
        ("adam", [0.9, 0.95], False),
        ("adam", [0.99, 0.95], True),
        ("adam", [0.99, 0.999], False),
        ("adopt", [0.99, 0.95], False),
    ],
)
def test_banner_warns_of_a_momentum_that_outlives_adams_second_moment(rule, betas, warned):
    text = plan({"rule": rule, "betas": betas}).describe()
    assert (
        "beware: beta 0.99 outlives beta2 0.95, with which Adam can diverge; take beta2 above 0.9801" in text
    ) == warned


def test_banner_says_every_period_and_where_it_comes_from():
    text = plan(
        {"sync_every": {"params": 4, "exp_avg": "half_life", "exp_avg_sq": None}, "outer_optimizer": {}}
    ).describe()
    for words in (
        "2 replica(s) of 2 rank(s)",
        "params: every 4 steps (given), 4,000 bytes",
        "half-life of 0.9",
        "exp_avg_sq: never averaged",
        "outer Nesterov step on averaged params: lr 0.6, by the number of replicas, 2; momentum 0.9",
        "times fewer than synchronous",
        "up to 8,000 bytes on each rank while averages fly",
        "not averaged: gradients, exp_avg_sq, buffers",
    ):
        assert words in text
    alone = plan(replica_size=4).describe()
    assert "nothing to average, this is the plain optimizer" in alone


def test_banner_says_that_one_replica_with_an_outer_optimizer_is_not_the_plain_optimizer():
    outer = {"sync_every": {"params": 4, "exp_avg": None, "exp_avg_sq": None}, "outer_optimizer": {"momentum": 0.8}}
    assert (
        "every 4 steps an outer Nesterov step on its parameters, lr 0.5, by the number of replicas, 1; momentum 0.8"
        in (plan(outer, replica_size=4).describe())
    )


@pytest.mark.parametrize(("chunk_bytes", "divisor"), itertools.product([4, 40, 1 << 20], [1, 3]))
@pytest.mark.parametrize("sizes", [[6, 6, 6], [0, 5, 0], [1], [100, 1, 7], [0]], ids=str)
def test_packing_conserves_every_element_once(sizes, chunk_bytes, divisor):
    tensors = [torch.arange(size, dtype=[torch.float32, torch.bfloat16][i % 2]) + 1 for i, size in enumerate(sizes)]
    bucket = pack(tensors, torch.float32, chunk_bytes, divisor)
    flat = torch.cat(bucket.chunks) if bucket.chunks else torch.empty(0)
    assert torch.equal(flat[: sum(sizes)], torch.cat([t.float() for t in tensors]))
    assert not flat[sum(sizes) :].any() and flat.numel() - sum(sizes) < divisor
    assert all(chunk.numel() % divisor == 0 for chunk in bucket.chunks)
    for chunk in bucket.chunks:
        chunk.mul_(2)
    assert all(torch.equal(view, 2 * t.float()) for view, t in zip(bucket.views, tensors, strict=True))
