"""Who in a replica holds which parameter. Peers, the ranks of a column, must hold the same, cut alike; the ranks of a
replica may hold other parts of the model, such as stages of a pipeline or experts, under names of their own."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.errors import ConfigError

SAME_MODEL = (
    "build the same model on every rank; where ranks of a replica hold different parts, such as stages of a pipeline "
    'or experts, pass mesh=, the mesh of all ranks whose dimension "replicate" runs across replicas: peers hold one '
    "part then, cut alike"
)
NAME_OF_ITS_OWN = (
    "give a part that the others have not a name of its own, the one in the whole model: "
    'attach(nn.ModuleDict({"stage1": stage}), ...) puts it before all names of a stage'
)


def agree_on_parts(whole: Mapping[str, str], here: Mapping[str, str], groups: Groups) -> None:
    """Raises ``ConfigError`` on every rank if peers hold other parameters, or others of a replica mean something else
    by a name. Collective over all ranks.

    Args:
        whole: parameter -> what is true of all of it, such as its shape.
        here: parameter -> which part of it lies on this rank.
    """
    among, mine = groups.topology.ranks_by_shard, {name: f"{said}{here.get(name, '')}" for name, said in whole.items()}
    check_same_on_all_ranks("model parameter", mine, do=SAME_MODEL, group=groups.world, among=among)
    if not _differ(whole, groups):
        return
    everyone = all_gather_by_rank(dict(whole), groups.world)
    for row in groups.topology.ranks_by_replica:
        for name in dict.fromkeys(name for rank in row for name in everyone[rank]):
            holders = [rank for rank in row if name in everyone[rank]]
            expected = everyone[holders[0]][name]
            if others := [rank for rank in holders if everyone[rank][name] != expected]:
                raise ConfigError(
                    f"model parameter {name}",
                    f"{expected} on every rank of a replica that has it, as on rank {holders[0]}",
                    f"{everyone[others[0]][name]} on rank(s) {others}",
                    NAME_OF_ITS_OWN,
                )


def holders_of(names: Iterable[str], groups: Groups) -> dict[str, int]:
    """Name of this rank -> how many ranks of its replica have it; nothing where all of them have the same names, in any
    replica. Collective over all ranks."""
    mine = sorted(names)
    if not _differ(dict.fromkeys(mine, ""), groups):
        return {}
    everyone = all_gather_by_rank(mine, groups.world)
    counts = Counter(name for rank in groups.topology.shard_group for name in everyone[rank])
    return {name: counts[name] for name in mine}


def _differ(mine: Mapping[str, str], groups: Groups) -> bool:
    """Whether any ranks of any replica have different ones. Collective over all ranks."""
    if groups.topology.replica_size == 1:
        return False
    digest = all_gather_by_rank(hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest(), groups.world)
    return any(len({digest[rank] for rank in row}) > 1 for row in groups.topology.ranks_by_replica)
