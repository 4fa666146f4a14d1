"""The process groups of a topology, and plain data over one of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from deslo_plugin.comm.progress import STORE_TIMEOUT_S
from deslo_plugin.comm.topology import Topology
from deslo_plugin.errors import ConfigError, require

# An NCCL collective holds its share of the GPU for as long as the slowest link takes, and a slow link needs no more.
MAX_CTAS = 4


@dataclass(frozen=True)
class Groups:
    """The process groups that this rank belongs to: all replicas, its own, its shard's peers in all of them, and
    itself.

    They are None in a process that was started alone.
    """

    topology: Topology
    world: dist.ProcessGroup | None
    shard: dist.ProcessGroup | None
    replica: dist.ProcessGroup | None
    singleton: dist.ProcessGroup | None


_made: "WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Topology, float, bool], Groups]]" = WeakKeyDictionary()
_of_files: "WeakKeyDictionary[dist.ProcessGroup, dict[Topology, Groups]]" = WeakKeyDictionary()
_inner: "WeakKeyDictionary[dist.ProcessGroup, dict[tuple[tuple[int, ...], ...], dist.ProcessGroup]]" = (
    WeakKeyDictionary()
)
_broken: "WeakSet[dist.ProcessGroup]" = WeakSet()


def make_groups(
    topology: Topology, timeout_s: float, *, on_cpu: bool = False, within: dist.ProcessGroup | None = None
) -> Groups:
    """The groups, created once in a world, since each keeps threads and sockets, and again once averages over them have
    failed; every rank of the topology must call it.

    Args:
        timeout_s: bounds each average, not the replica's own traffic.
        on_cpu: whether averages also carry tensors on the CPU where NCCL is the backend, as with an offloaded
            optimizer; it must be the same on all ranks.
        within: the group of the topology's ranks, where that is not the world.

    Raises ``ConfigError`` for a topology of fewer ranks than the world where torch could only hang.
    """
    made, key = _made.setdefault(require(dist.group.WORLD), {}), (topology, timeout_s, on_cpu)
    known = made.get(key)
    if known is None or any(all_gather_by_rank(known.replica in _broken, within).values()):
        made[key] = _create_groups(topology, timeout_s, on_cpu, within)
    return made[key]


def make_groups_of_files(groups: Groups) -> Groups:
    """``world`` and ``shard`` of ``groups`` once more, over gloo: what a thread that writes files sends over them never
    meets what training sends. Created once in a world. Collective over ``groups.world``; None where that is None."""
    if groups.world is None:
        return groups
    made = _of_files.setdefault(groups.world, {})
    if (topology := groups.topology) not in made:
        local = _named_alike(groups.world)
        if topology.world_size != dist.get_world_size():
            _expect_names(local)
        made[topology] = Groups(
            topology=topology,
            world=_own_of([sorted(topology.ranks)], topology, local, backend="gloo"),
            shard=_own_of([list(row) for row in topology.ranks_by_replica], topology, local, backend="gloo"),
            replica=None,
            singleton=None,
        )
    return made[topology]


def make_inner_group(lists: Sequence[Sequence[int]], groups: Groups) -> dist.ProcessGroup:
    """The group of that one of ``lists`` which this rank is in, created once in a world. Collective over all ranks."""
    made, key = _inner.setdefault(require(groups.world), {}), tuple(map(tuple, lists))
    if key not in made:
        made[key] = _own_of([list(ranks) for ranks in lists], groups.topology, _named_alike(groups.world))
    return made[key]


def mark_broken(group: dist.ProcessGroup) -> None:
    """A collective failed in ``group`` on this rank: what is left of it there would meet those of the next
    attachment."""
    _broken.add(group)


def uses_nccl(group: dist.ProcessGroup | None = None) -> bool:
    """Whether tensors on GPUs travel by NCCL in ``group``, by default the world."""
    return "nccl" in dist.get_backend_config(group)


def open_groups(groups: Groups, device: torch.device, *, averages: bool = True) -> None:
    """Sends one element over each group: NCCL's communicators come into being now, with their memory and their links,
    and not inside the first average. Collective. ``averages``: whether these travel over ``groups.replica``.

    Raises ``ConfigError`` for ranks that do not reach each other."""
    used = [("all ranks", groups.world), ("a replica", groups.shard), ("averages", groups.replica)][: 2 + averages]
    for name, group in used:
        try:
            where = device if device.type in dist.get_backend_config(group) else device_of(group)
            dist.all_reduce(torch.zeros(1, device=where), group=group)
            if where == device and device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        except RuntimeError as error:
            raise ConfigError(
                f"attach's process group of {name}",
                f"ranks {dist.get_process_group_ranks(group)} to reach each other",
                repr(str(error).splitlines()[0]),
                "see that the network interface is right (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and that GPU memory "
                "is left for the communicator",
            ) from error


def _create_groups(topology: Topology, timeout_s: float, on_cpu: bool, within: dist.ProcessGroup | None) -> Groups:
    everyone, local = topology.world_size == dist.get_world_size(), _named_alike(within)
    if not everyone:
        _expect_names(local)

    def own_of(lists: list[list[int]], **options: Any) -> dist.ProcessGroup:
        return _own_of(lists, topology, local, **options)

    return Groups(
        topology=topology,
        world=dist.group.WORLD if everyone else own_of([sorted(topology.ranks)]),
        shard=own_of([list(row) for row in topology.ranks_by_replica]),
        replica=own_of(topology.ranks_by_shard, **_options_of_averages(timeout_s, on_cpu)),
        singleton=own_of([[rank] for rank in topology.ranks]),
    )


def _own_of(lists: list[list[int]], topology: Topology, local: bool, **options: Any) -> dist.ProcessGroup:
    """The group of that list which this rank is in. Each rank creates its own alone, which is quick in a large world,
    or all ranks create all of them."""
    if local or (len(lists) == topology.world_size and not _by_torchcomms()):  # nobody else knows a name of these
        ranks = next(ranks for ranks in lists if topology.rank in ranks)
        return dist.new_group(ranks, use_local_synchronization=True, **options)
    groups = [dist.new_group(ranks, **options) for ranks in lists]
    return next(group for group, ranks in zip(groups, lists) if topology.rank in ranks)


def _options_of_averages(timeout_s: float, on_cpu: bool) -> dict[str, Any]:
    """Of the group that averages run on: its time limit and, under NCCL, how much of a GPU it may hold."""
    if not uses_nccl():
        return {"timeout": timedelta(seconds=timeout_s)}
    # NCCL ends the process once its time is over: not before it has been said who is late
    timeout = timedelta(seconds=timeout_s + 4 * STORE_TIMEOUT_S)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.min_ctas, options.config.max_ctas = 1, MAX_CTAS
    reaches_cpu = on_cpu or "gloo" in dist.get_backend_config()
    backend = "cpu:gloo,cuda:nccl" if reaches_cpu else "nccl"
    return {"timeout": timeout, "backend": backend, "pg_options": options}


def _named_alike(within: dist.ProcessGroup | None) -> bool:
    """Whether groups that ranks create among themselves find each other: torch names them by how many groups a rank is
    in, which differs once some ranks are in a group that others are not. Collective."""
    known = getattr(distributed_c10d, "_world", None)
    if known is None or _by_torchcomms():
        return False
    return len(set(all_gather_by_rank(len(known.pg_names), within).values())) == 1


def _by_torchcomms() -> bool:
    return getattr(distributed_c10d, "_use_torchcomms_enabled", bool)()


def _expect_names(local: bool) -> None:
    """Raises ``ConfigError`` where the groups of some ranks of the world cannot be created without the others."""
    if require(dist.group.WORLD).bound_device_id is not None:
        raise ConfigError(
            "attach(process_group=...)",
            "all ranks of the world where it is bound to a device, since NCCL splits new groups off with all of them",
            "some of them",
            "leave device_id out of init_process_group, or attach the whole world",
        )
    if not local:
        raise ConfigError(
            "attach(process_group=...)",
            "ranks that are in equally many process groups, by whose count torch names new ones",
            "ranks of which some are in more",
            "call attach before any dist.new_group that only some of these ranks are in",
        )


def all_gather_by_rank(value: Any, group: dist.ProcessGroup | None = None) -> dict[int, Any]:
    """Global rank -> its ``value``, over ``group`` or the world. Collective.

    A value is what JSON can hold, or a ``ConfigError``: nothing that a peer sends is run. Tuples come back as lists,
    and keys as strings. Raises ``TypeError`` for anything else. (torch's object collectives unpickle, and need numpy.)
    """
    text, device = json.dumps(value, default=_error_as_text).encode(), device_of(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(text)], device=device), group=group)
    own = torch.zeros(max(map(int, lengths)), dtype=torch.uint8, device=device)
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(texts, own, group=group)
    values = [_read(each[: int(length)]) for each, length in zip(texts, lengths)]
    return dict(zip(dist.get_process_group_ranks(group), values))


def device_of(group: dist.ProcessGroup | None) -> str:
    """Where small tensors of ``group`` may be: on the host, if its backend reaches there."""
    devices = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]
    return "cpu" if "cpu" in devices else devices[0]


def any_of_shards(tensor: Any, flag: bool) -> bool:
    """Whether ``flag`` holds on any rank that has a part of ``tensor``, a DTensor; of a plain one this rank has all.
    Collective over these ranks."""
    cut = [i for i, each in enumerate(getattr(tensor, "placements", ())) if not each.is_replicate()]
    for group in [tensor.device_mesh.get_group(dimension) for dimension in cut]:
        word = torch.full((1,), flag, dtype=torch.int32, device=device_of(group))
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=group)
        flag = bool(word)
    return flag


def reachable(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``tensor`` where the backend of ``group`` reaches it: NCCL alone knows no CPU."""
    known = f"{tensor.device.type}:" in dist.get_backend_config(group)
    return tensor if known else tensor.to(device_of(group))


def _error_as_text(error: Any) -> dict[str, Any]:
    if not isinstance(error, ConfigError):
        raise TypeError(f"all_gather_by_rank: expected plain data or a ConfigError, got {type(error).__name__}")
    return {"ConfigError": error.__reduce__()[1]}


def _read(text: Tensor) -> Any:
    content = bytearray(len(text))
    torch.frombuffer(content, dtype=torch.uint8).copy_(text)
    return json.loads(content, object_hook=_error_of)


def _error_of(found: dict[str, Any]) -> Any:
    return ConfigError(*found["ConfigError"]) if [*found] == ["ConfigError"] else found
