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
from deslo_plugin.errors import require
from deslo_plugin.frameworks.deepspeed.degrees import refuse_indivisible

# what DeepSpeed keeps once for all engines; the last is of hpZ, which an engine without it would take over
OF_THE_PROCESS = ("mpu", "mesh_device", "_ZERO_PARAM_INTRA_PARALLEL_GROUP")


def groups_of(deslo: DesloConfig, ds: Mapping[str, Any]) -> Groups:
    """The process groups of a job; the same ones for ``zero.Init`` and for the engine. Collective at first. Raises
    ``ConfigError`` for degrees of parallelism that do not divide a replica."""
    world, rank = dist.get_world_size(), dist.get_rank()
    topology = make_topology(deslo, world_size=world, rank=rank, local_world_size=local_world_size())
    refuse_indivisible(ds, topology.replica_size)
    zero = ds.get("zero_optimization") or {}
    offloads = any(name in zero for name in ("offload_optimizer", "offload_param", "cpu_offload"))
    return make_groups(topology, deslo.timeout_s, on_cpu=offloads)


class ReplicaMPU:
    """DeepSpeed's ``mpu``: partitions, reductions, norms and overflow checks stay inside a replica, data does not.

    The data-parallel *group* is the replica's; the data-parallel *rank and size* are the world's, so that replicas
    read different data and ``train_batch_size`` counts them all. The model-parallel group is this rank alone where no
    tensor is cut, because DeepSpeed takes a missing one for the world.

    ``sequence``, ``tensor``: ranks of this replica that have parts of the same samples, or of the same matrices, or
    None. ``data``: those that hold the same tensors, between which ZeRO partitions them; all of the replica's where no
    matrix is cut.
    """

    def __init__(
        self,
        groups: Groups,
        sequence: dist.ProcessGroup | None = None,
        tensor: dist.ProcessGroup | None = None,
        data: dist.ProcessGroup | None = None,
    ):
        self.groups, self.sequence, self.tensor = groups, sequence, tensor
        self.data = require(data or groups.shard)

    @property
    def sharers(self) -> int:
        """Consecutive ranks that take the same samples."""
        return (self.sequence.size() if self.sequence else 1) * (self.tensor.size() if self.tensor else 1)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data)

    def get_data_parallel_world_size(self) -> int:
        return self.groups.topology.world_size // self.sharers

    def get_data_parallel_rank(self) -> int:
        return self.groups.topology.rank // self.sharers

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.data.size()

    def get_sequence_data_parallel_rank(self) -> int:
        return self.data.rank()

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self.sequence or require(self.groups.singleton)

    def get_sequence_parallel_world_size(self) -> int:
        return self.get_sequence_parallel_group().size()

    def get_sequence_parallel_rank(self) -> int:
        return self.get_sequence_parallel_group().rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor or require(self.groups.singleton)

    def get_model_parallel_world_size(self) -> int:
        return self.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        return self.get_model_parallel_group().rank()

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self.get_model_parallel_group())[0]

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


@contextmanager
def use_mpu(unit: ReplicaMPU | None) -> Iterator[None]:
    """Makes ``unit`` what DeepSpeed asks for groups in this process, for a while: other engines have their own mpu or
    mesh."""
    before = {name: getattr(deepspeed_groups, name) for name in OF_THE_PROCESS}
    deepspeed_groups.mpu, deepspeed_groups.mesh_device = unit, None
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(deepspeed_groups, name, value)
