"""Replicas must start equal: the same model, the same values, the same optimizer on every rank, or an error before step
1."""

import hashlib
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deslo_plugin.algorithm.adaptive_periods import adaptive
from deslo_plugin.averaging.members import trains
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checks.replica_parts import NAME_OF_ITS_OWN
from deslo_plugin.comm.consistency import check_same_on_all_ranks, digests
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.comm.topology import Topology, spread
from deslo_plugin.config.load import as_dict
from deslo_plugin.config.reader import plain
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.availability import kernels_on
from deslo_plugin.log import log_rank0

SEED_ALIKE = 'seed every rank alike, or set "deslo": {"initial_params": "auto"} to start from replica 0'
INITIAL = "initial value of parameter"


def local_world_size() -> int:
    """Ranks on this node, as the launcher said: torchrun's LOCAL_WORLD_SIZE, the deepspeed launcher's LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())


def say_placement(topology: Topology, world: dist.ProcessGroup) -> None:
    """Warns if a replica lies on more nodes than it needs. Collective."""
    hosts = all_gather_by_rank(socket.gethostname(), world)
    if complaint := spread(topology, [hosts[rank] for rank in topology.ranks]):
        log_rank0(complaint, logging.WARNING)


def agree_on_model(
    model: nn.Module, shape_of: Callable[[Tensor], Iterable[int]], group: dist.ProcessGroup | None = None
) -> None:
    """Raises ``ConfigError`` on every rank if parameters differ in name, shape, dtype or in being trained."""
    check_same_on_all_ranks(
        "model parameter", model_traits(model, shape_of), group=group, do="build the same model on every rank"
    )


def model_traits(model: nn.Module, shape_of: Callable[[Tensor], Iterable[int]]) -> dict[str, str]:
    """Parameter name -> shape, dtype and whether it is trained: what replicas must have alike."""
    return {
        name: f"{tuple(shape_of(p))} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for name, p in model.named_parameters()
    }


def agree_on_optimizer(
    averaging: StateAverager,
    config: Config,
    world: dist.ProcessGroup | None = None,
    peers: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raises ``ConfigError`` on every rank if configs or param groups differ.

    ``peers``: those ranks that hold the same part of a model of which others hold other parts. Rates are compared among
    them alone; averages are due alike everywhere, since a replica decides on each as a whole."""
    traits, do = optimizer_traits(averaging, config), "build the same optimizer on every rank"
    if peers is not None:
        rates = {key: value for key, value in traits.items() if key.endswith((".lr", ".weight_decay"))}
        check_same_on_all_ranks("optimizer", rates, do=do, group=world, among=peers)
        trained = {
            f"param group {index}.params": "some that train"
            if any(map(trains, group["params"]))
            else "none that trains"
            for index, group in enumerate(averaging.optimizer.param_groups)
        }
        traits = {key: value for key, value in traits.items() if key not in rates} | trained
        do += ", with as many param groups for each part of the model, in each of them parameters that train"
    check_same_on_all_ranks("optimizer", traits, do=do, group=world)


def optimizer_traits(averaging: StateAverager, config: Config) -> dict[str, Any]:
    """Setting -> value, of both blocks and of the param groups: what replicas must have alike."""
    of_groups = {
        f"param group {index}.{key}": plain(group[key])
        for index, group in enumerate(averaging.optimizer.param_groups)
        for key in ("lr", "weight_decay", "sync_every")
        if key in group
    }
    kind = {"type": type(averaging.optimizer).__name__}
    if any(adaptive(group["sync_every"]) for group in averaging.groups):
        kind["kernels, which measure what adaptive periods go by,"] = kernels_on(averaging.optimizer.state)
    return as_dict(config) | of_groups | kind


def broadcast_or_check_params(
    whole: Mapping[str, Tensor],
    sharded: Mapping[str, Tensor],
    initial: str,
    groups: Groups,
    stage: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Makes replicas equal to replica 0, and says on which ranks what differed; ``initial`` "broadcast" says nothing,
    "check" raises ``ConfigError`` on every rank instead. Collective.

    Args:
        whole: tensors that every rank of every replica must hold alike.
        sharded: tensors that each rank must hold like its peers in the other replicas.
        stage: copies a tensor to where the process groups reach it.
    """
    topology = groups.topology
    if initial != "check":
        first = topology.ranks_by_replica[0][0]
        for tensors, group, source, among in (
            (whole, groups.world, first, [topology.ranks]),
            (sharded, groups.replica, topology.replica_group[0], topology.ranks_by_shard),
        ):
            different = differing(digests(tensors.items()), among, groups.world)
            for name in (name for name in different if name in tensors):
                staged = stage(tensors[name].detach().contiguous())
                dist.broadcast(staged, src=source, group=group)
                with torch.no_grad():
                    tensors[name].copy_(staged)
            if different and initial == "auto":
                _say_different(different, first)
    check_same_on_all_ranks(INITIAL, digests(whole.items()), do=SEED_ALIKE, group=groups.world)
    check_same_on_all_ranks(
        INITIAL, digests(sharded.items()), do=SEED_ALIKE, group=groups.world, among=topology.ranks_by_shard
    )


def differing(
    mine: Mapping[str, Any], among: Sequence[Sequence[int]], world: dist.ProcessGroup | None
) -> dict[str, list[int]]:
    """Name, on any rank -> the ranks whose value is not that of the first of their ranks in ``among`` that has it; the
    same on every rank. Collective."""
    digest = all_gather_by_rank(hashlib.sha256(repr(tuple(mine.items())).encode()).hexdigest(), world)
    if all(digest[rank] == digest[first] for first, *others in among for rank in others):
        return {}
    values = all_gather_by_rank(dict(mine), world)
    different: dict[str, list[int]] = {}
    for ranks in among:
        expected: dict[str, Any] = {}
        for rank in ranks:
            for name, value in values[rank].items():
                if expected.setdefault(name, value) != value:
                    different.setdefault(name, []).append(rank)
    return {name: sorted(ranks) for name, ranks in different.items()}


def refuse_parts(plain: Mapping[str, Tensor], groups: Groups, forgotten: Collection[str]) -> None:
    """Raises ``ConfigError`` on every rank if plain tensors are meant to differ inside a replica: experts, or tensor
    parallelism by hand. An average and a checkpoint would keep those of one rank. Collective.

    Those that sharding has only ``forgotten`` are meant to differ if they are alike in all replicas: else nobody seeded
    them."""
    if groups.topology.replica_size == 1:
        return
    topology, mine = groups.topology, digests(plain.items())
    inside = differing(mine, topology.ranks_by_replica, groups.world)
    across = differing(mine, topology.ranks_by_shard, groups.world)
    for name, ranks in inside.items():
        if name not in across or name not in forgotten:
            raise ConfigError(
                f"attach(model) parameter {name}",
                "one value on the ranks of a replica, or a DTensor",
                f"another on rank(s) {ranks}",
                "make it a DTensor (distribute_tensor, or DTensor.from_local with Shard), so that averages and "
                "checkpoints keep "
                f"every part, or {NAME_OF_ITS_OWN}; "
                'only if it is meant to be the same everywhere, set "deslo": '
                '{"initial_params": "broadcast"}',
            )


def _say_different(different: Mapping[str, Sequence[int]], first: int) -> None:
    ranks = sorted({rank for each in different.values() for rank in each})
    log_rank0(
        f"deslo: {listed(different)} differed at the start on rank(s) {ranks}: every replica starts with the values "
        f"of rank "
        f'{first} and its replica now, as DDP would; to make that an error, set "deslo": {{"initial_params": "check"}}',
        logging.WARNING,
    )


def listed(names: Iterable[str]) -> str:
    """The first three, and how many more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
