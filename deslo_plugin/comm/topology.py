"""Which rank is which: replicas that average, and inside each the shards that reduce gradients at every step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deslo_plugin.config.schema import DesloConfig
from deslo_plugin.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """``ranks_by_replica[r][s]`` is the global rank that holds shard s of replica r; ``rank`` is this one.

    The *shard group* is the ranks of one replica, a row, which reduce gradients at every step. The *replica group* is
    the same shard of every replica, a column, where averages run.
    """

    ranks_by_replica: tuple[tuple[int, ...], ...]
    rank: int

    @property
    def ranks(self) -> list[int]:
        """All ranks, replica by replica."""
        return [rank for row in self.ranks_by_replica for rank in row]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def replicas(self) -> int:
        return len(self.ranks_by_replica)

    @property
    def replica_size(self) -> int:
        return len(self.ranks_by_replica[0])

    @property
    def replica(self) -> int:
        return next(index for index, row in enumerate(self.ranks_by_replica) if self.rank in row)

    @property
    def shard(self) -> int:
        return self.ranks_by_replica[self.replica].index(self.rank)

    @property
    def shard_group(self) -> list[int]:
        return list(self.ranks_by_replica[self.replica])

    @property
    def replica_group(self) -> list[int]:
        return self.ranks_by_shard[self.shard]

    @property
    def ranks_by_shard(self) -> list[list[int]]:
        """The replica group of every shard."""
        return [list(column) for column in zip(*self.ranks_by_replica)]


def contiguous(world_size: int, rank: int, replica_size: int) -> Topology:
    """Rank = replica * replica_size + shard, as launchers number the processes of a node."""
    starts = range(0, world_size, replica_size)
    return Topology(tuple(tuple(range(start, start + replica_size)) for start in starts), rank)


def topology_of_groups(groups: Iterable[Sequence[int]], rank: int) -> Topology:
    """Each of ``groups``, which come from the ranks in them, is a replica. Raises ``ConfigError`` if they are not
    equally large, or share ranks."""
    rows = sorted({tuple(ranks) for ranks in groups})
    if len({len(row) for row in rows}) > 1 or len({rank for row in rows for rank in row}) < sum(map(len, rows)):
        raise ConfigError(
            "attach(model)",
            "replicas of equally many ranks, of which no two share any: each rank averages with its peer of the others",
            f"the groups {', '.join(map(str, map(list, rows)))}",
            "wrap the model on one dimension of mesh = init_device_mesh(device, (replicas, ranks of a replica), "
            'mesh_dim_names=("replicate", "shard"))',
        )
    return Topology(tuple(rows), rank)


def divisors(number: int) -> str:
    """Those of ``number``, as a message lists them."""
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)


def make_topology(deslo: DesloConfig, *, world_size: int, rank: int, local_world_size: int) -> Topology:
    """Resolves ``replica_size: "auto"`` to one replica per node. Raises ``ConfigError`` if it does not fit the
    world."""
    asked, where = deslo.replica_size, "deslo.replica_size"
    if asked == "auto" and local_world_size >= world_size > 1:
        raise ConfigError(
            where,
            "a number of ranks when all ranks are on one node",
            '"auto"',
            f'write "deslo": {{"replica_size": S}} with S a divisor of {world_size}',
        )
    size = min(local_world_size, world_size) if asked == "auto" else asked
    if world_size % size:
        raise ConfigError(
            where,
            f"a divisor of the world size {world_size}",
            str(size),
            f"use one of {divisors(world_size)}, or start another number of processes",
        )
    return contiguous(world_size, rank, size)


def spread(topology: Topology, hosts: Sequence[str]) -> str | None:
    """What is wrong with how replicas lie on nodes, ``hosts`` being that of each of ``topology.ranks``; None if
    nothing.

    A replica should be on as few nodes as its ranks need, since it reduces gradients at every step.
    """
    host_of = dict(zip(topology.ranks, hosts))
    per_node = max(hosts.count(host) for host in set(hosts))
    needed = -(-topology.replica_size // per_node)
    for replica, row in enumerate(topology.ranks_by_replica):
        nodes = {host_of[rank] for rank in row}
        if len(nodes) > needed:
            return (
                f"deslo: replica {replica} (ranks {list(row)}) lies on {len(nodes)} nodes ({', '.join(sorted(nodes))}) "
                f"where {needed} would do: its gradients cross the slow links at every step; number ranks node by "
                "node, and let deslo.replica_size be the ranks of a node or a divisor of them"
            )
    return None
