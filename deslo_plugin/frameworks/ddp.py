"""DistributedDataParallel: a comm hook that keeps gradients inside a replica."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future, collect_all
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.algorithm.state_names import GRADIENTS
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checks.module_wrappers import reducers
from deslo_plugin.checks.replica_checks import local_world_size
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.comm.topology import Topology, make_topology, topology_of_groups
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.frameworks.plain import Plain

_hooked: "WeakKeyDictionary[DistributedDataParallel, tuple[tuple[int, ...], ...]]" = WeakKeyDictionary()
"""DDP that is kept inside replicas -> the ranks of these replicas."""


class DDP(Plain):
    """DDP around, inside or among the modules of a model: a replica is ``deslo.replica_size`` ranks, 1 in the flat form
    and more in the hierarchical one, or those of DDP's own process group if that is smaller than the world."""

    @property
    def ddps(self) -> list[DistributedDataParallel]:
        return reducers(self.around)

    def topology(self) -> Topology:
        found = self._replicas()
        if self.mesh is not None and super().topology() != found:
            raise ConfigError(
                "attach(model, mesh=...)",
                f"the replicas that DDP has, ranks {', '.join(map(str, map(list, found.ranks_by_replica)))}",
                f"a mesh of other ones, {', '.join(map(str, map(list, super().topology().ranks_by_replica)))}",
                "leave mesh= out, or set deslo.replica_size; where ranks of a replica hold different parts of the "
                "model, shard these with fully_shard in place of DDP",
            )
        return found

    def _replicas(self) -> Topology:
        """The ranks of DDP's own group if it is smaller than the world, else ``deslo.replica_size`` ranks."""
        own = self.ddps[0].process_group
        if own.size() < dist.get_world_size():
            groups = all_gather_by_rank(dist.get_process_group_ranks(own)).values()
            return topology_of_groups(groups, dist.get_rank())
        rank, size = dist.get_rank(), dist.get_world_size()
        topology = make_topology(self.config.deslo, world_size=size, rank=rank, local_world_size=local_world_size())
        if any(each.find_unused_parameters for each in self.ddps) and topology.replica_size > 1:
            raise ConfigError(
                "DDP(find_unused_parameters=True)",
                "DDP over the ranks of one replica, since every backward sends a bitmap over its process group",
                "DDP over the world",
                "turn it off (Hugging Face: ddp_find_unused_parameters=False), or DDP(model, process_group=group, ...) "
                f"with group, _ = torch.distributed.new_subgroups(group_size={topology.replica_size})",
            )
        return topology

    def refuse(self, topology: Topology) -> None:
        super().refuse(topology)
        groups = {tuple(dist.get_process_group_ranks(each.process_group)) for each in self.ddps}
        if len(groups) > 1:
            raise ConfigError(
                "attach(model)", "one process group for every DDP in it", f"{len(groups)}", "give all of them the same"
            )
        for each in self.ddps:
            if each in _hooked:
                if _hooked[each] != topology.ranks_by_replica:
                    raise ConfigError(
                        "attach(model)",
                        "the replicas that its DDP was attached with",
                        "others",
                        "give both optimizers one deslo.replica_size",
                    )
            elif each._comm_hooks:
                raise _has_a_hook(f"{getattr(each._comm_hooks[0][0], '__qualname__', 'one')}")
            if each._use_python_reducer:
                raise ConfigError(
                    "DDP(model)",
                    "its reducer in C++",
                    "python_reducer of torch.compile",
                    'set torch._dynamo.config.optimize_ddp = "ddp_optimizer" before the model is wrapped',
                )
        reduced = {
            id(param)
            for each in self.ddps
            for name, param in each.module.named_parameters()
            if name not in each.parameters_to_ignore
        }
        trained = ((name, id(param)) for name, param in self.around.named_parameters() if param.requires_grad)
        left = [name for name, param in trained if param not in reduced]
        if left and (topology.replica_size > 1 or self.config.deslo.synchronous_steps):
            raise ConfigError(
                "attach(model)",
                "DDP around every trained parameter",
                f"none around {', '.join(left[:3])}" + f" and {len(left) - 3} more" * (len(left) > 3),
                "wrap the whole model in one DDP, or set deslo.replica_size to 1 without synchronous_steps",
            )

    def forgotten(self) -> None:
        return None

    def own_groups(self) -> Sequence[dist.ProcessGroup]:
        return [each.process_group for each in self.ddps]

    def copies(self, groups: Groups) -> dist.ProcessGroup | None:
        return groups.shard

    def keep_gradients_inside(self, averaging: StateAverager, groups: Groups) -> None:
        for each in self.ddps:
            refuse_join(each)
            if groups.topology.replicas > 1:
                hook(each, averaging, groups)

    def gradient_bytes(self, divisor: int) -> list[int]:
        """As they are."""
        return [sum(param.nbytes for param in params) for params in self.trained_by_group()]


def hook(model: DistributedDataParallel, averaging: StateAverager, groups: Groups) -> None:
    """Replaces DDP's all-reduce over the world: inside the replica at every step, over the world in the warm-up.

    A replica of one rank has nothing to reduce: after the warm-up DDP does not synchronise at all, which also spares
    the bitmap that ``find_unused_parameters`` would send. Buffers are not broadcast any more; they average with the
    parameters.

    Raises ``ConfigError`` if the model has a hook already.
    """

    def reduce(_: None, bucket: dist.GradBucket) -> Future[Tensor]:
        synchronous = averaging.synchronous
        group, buffer = require(groups.world if synchronous else groups.shard), bucket.buffer()
        if synchronous:
            averaging.record(SyncEvent(averaging.steps + 1, {GRADIENTS: buffer.nbytes}, 0.0, {}))
        if group.size() == 1:
            return collect_all([]).then(lambda _: buffer)
        work = dist.all_reduce(buffer.div_(group.size()), group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    if model in _hooked:  # by the attach of another optimizer
        return
    try:
        model.register_comm_hook(None, reduce)
    except RuntimeError as error:
        raise _has_a_hook(f"{str(error).splitlines()[0]!r}") from error
    _hooked[model] = groups.topology.ranks_by_replica
    model.broadcast_buffers = False
    if groups.topology.replica_size > 1:
        return

    def finish(*_: object) -> None:
        if not averaging.synchronous:
            model.require_backward_grad_sync = False
            # else static_graph sends one bitmap in its first backward
            model._static_graph_delay_allreduce_enqueued = True
            after.remove()

    after = averaging.optimizer.register_step_post_hook(finish)
    finish()


def _has_a_hook(got: str) -> ConfigError:
    return ConfigError(
        "attach(model)",
        "a DDP model without a communication hook",
        got,
        "attach once, and register no other hook: the average replaces the reduction that it compresses",
    )


def refuse_join(model: DistributedDataParallel) -> None:
    """From now on ``model.join()`` raises ``ConfigError``, at once and on every rank."""
    model.join = model.join_hook = _refuse_join  # type: ignore[method-assign]


def _refuse_join(*_: object, **__: object) -> None:
    raise ConfigError(
        "DDP.join()",
        "as many steps on every rank",
        "a join, whose idle ranks answer for gradients and not for averages",
        "remove it, and on a rank that has run out of batches call attachment.skip_step() in place of "
        "optimizer.step() until the others are done",
    )
