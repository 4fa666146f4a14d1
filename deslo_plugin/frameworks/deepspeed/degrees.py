"""Into how many ranks may a DeepSpeed job cut what lies inside a replica?"""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.comm.topology import divisors
from deslo_plugin.errors import ConfigError

DEGREES = {  # of the JSON -> what its groups of ranks do
    "zero_optimization.zero_hpz_partition_size": "keep a second partition",
    "sequence_parallel_size": "share a sequence",
    "tensor_parallel.autotp_size": "share a matrix",
}


def at(ds: Any, path: str) -> Any:
    """The value of a JSON at ``a.b.c``, None if there is none."""
    for key in path.split("."):
        ds = ds.get(key) if isinstance(ds, Mapping) else None
    return ds


def refuse_indivisible(ds: Mapping[str, Any], replica_size: int) -> None:
    """Raises ``ConfigError`` for a degree of ``ds`` whose groups would span replicas."""
    for path, purpose in DEGREES.items():
        degree = at(ds, path)
        if isinstance(degree, int) and degree > 1 and replica_size % degree:
            raise ConfigError(
                path,
                f"a divisor of deslo.replica_size {replica_size}: ranks that {purpose} are of one replica",
                str(degree),
                f"use one of {divisors(replica_size)}, or another replica_size",
            )


def expect_inside(what: str, group: dist.ProcessGroup, groups: Groups, do: str) -> None:
    """Raises ``ConfigError`` on every rank if the ``group`` of any rank is not of consecutive ranks of one replica.
    Collective over all ranks."""
    size = groups.topology.replica_size
    for rank, ranks in all_gather_by_rank(dist.get_process_group_ranks(group), groups.world).items():
        first = rank - rank % len(ranks)
        if size % len(ranks) or ranks != list(range(first, first + len(ranks))):
            raise ConfigError(
                what, f"groups of consecutive ranks inside a replica of {size} ranks", f"ranks {ranks}", do
            )
