"""How DeepSpeed is told about replicas: an ``mpu`` whose data-parallel group is one replica."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from deslo_plugin.checks.replica_checks import local_world_size
from deslo_plugin.comm.process_groups import Groups, make_groups
from deslo_plugin.comm.topology import make_topology
from deslo_plugin.config.schema import DesloConfig


def groups_of(deslo: DesloConfig, ds: Mapping[str, Any]) -> Groups:
    """The process groups of a job; the same ones for ``zero.Init`` and for the engine. Collective at first."""
    world, rank = dist.get_world_size(), dist.get_rank()
    topology = make_topology(deslo, world_size=world, rank=rank, local_world_size=local_world_size())
    zero = ds.get("zero_optimization") or {}
    offloads = any(name in zero for name in ("offload_optimizer", "offload_param", "cpu_offload"))
    return make_groups(topology, deslo.timeout_s, on_cpu=offloads)


class ReplicaMPU:
    """DeepSpeed's ``mpu``: partitions, reductions, norms and overflow checks stay inside a replica, data does not.

    The data-parallel *group* is the replica's; the data-parallel *rank and size* are the world's, so that replicas
    read different data and ``train_batch_size`` counts them all. The model-parallel group is this rank alone, because
    DeepSpeed takes a missing one for the world.
    """

    def __init__(self, groups: Groups):
        self.groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.groups.shard

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.groups.topology.shard_group

    def get_data_parallel_world_size(self) -> int:
        return self.groups.topology.world_size

    def get_data_parallel_rank(self) -> int:
        return self.groups.topology.rank

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.groups.shard

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.groups.topology.replica_size

    def get_sequence_data_parallel_rank(self) -> int:
        return self.groups.topology.shard

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.groups.singleton

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


@contextmanager
def use_mpu(unit: ReplicaMPU | None) -> Iterator[None]:
    """Makes ``unit`` what DeepSpeed asks for groups in this process, for a while: other engines have their own mpu or
    mesh."""
    before = deepspeed_groups.mpu, deepspeed_groups.mesh_device
    deepspeed_groups.mpu, deepspeed_groups.mesh_device = unit, None
    try:
        yield
    finally:
        deepspeed_groups.mpu, deepspeed_groups.mesh_device = before
