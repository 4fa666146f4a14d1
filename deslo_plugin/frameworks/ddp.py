"""DistributedDataParallel: a comm hook that keeps gradients inside a replica."""

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future, collect_all
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.averaging import Averaging
from deslo_plugin.collectives import Groups, gathered
from deslo_plugin.config import DesloConfig
from deslo_plugin.frameworks.equality import local_world_size
from deslo_plugin.names import GRADIENTS
from deslo_plugin.strict import ConfigError
from deslo_plugin.telemetry import SyncEvent
from deslo_plugin.topology import Topology, make_topology


def topology_of(model: DistributedDataParallel, deslo: DesloConfig) -> Topology:
    """Replicas of ``deslo.replica_size`` ranks: 1 is the flat form, more the hierarchical one. DDP over a smaller process
    group than the world says by itself which ranks are one replica. Collective."""
    if model.process_group.size() < dist.get_world_size():
        own = tuple(dist.get_process_group_ranks(model.process_group))
        return Topology(tuple(sorted(set(gathered(own).values()))), dist.get_rank())
    topology = make_topology(
        deslo, world_size=dist.get_world_size(), rank=dist.get_rank(), local_world_size=local_world_size()
    )
    if model.find_unused_parameters and topology.replica_size > 1:
        raise ConfigError(
            "DDP(find_unused_parameters=True)", "DDP over the ranks of one replica, since every backward sends a bitmap over "
            "its process group", "DDP over the world",
            "turn it off (Hugging Face: ddp_find_unused_parameters=False), or DDP(model, process_group=group, ...) with "
            f"group, _ = torch.distributed.new_subgroups(group_size={topology.replica_size})",
        )
    return topology


def hook(model: DistributedDataParallel, averaging: Averaging, groups: Groups) -> None:
    """Replaces DDP's all-reduce over the world: inside the replica at every step, over the world in the warm-up.

    A replica of one rank has nothing to reduce: after the warm-up DDP does not synchronise at all, which also spares the
    bitmap that ``find_unused_parameters`` would send. Buffers are not broadcast any more; they average with the parameters.

    Raises ``ConfigError`` if the model has a hook already.
    """

    def reduce(_: None, bucket: dist.GradBucket) -> Future[Tensor]:
        synchronous = averaging.synchronous
        group, buffer = groups.world if synchronous else groups.shard, bucket.buffer()
        if synchronous:
            averaging.record(SyncEvent(averaging.steps + 1, {GRADIENTS: buffer.nbytes}, 0.0, {}))
        if group.size() == 1:
            return collect_all([]).then(lambda _: buffer)
        work = dist.all_reduce(buffer.div_(group.size()), group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    try:
        model.register_comm_hook(None, reduce)
    except RuntimeError as error:
        raise ConfigError("attach(model)", "a DDP model without a communication hook", f"{str(error).splitlines()[0]!r}",
                          "attach once, and register no other hook: the average replaces the reduction that it compresses") from error
    model.broadcast_buffers = False
    if groups.topology.replica_size > 1:
        return

    def finish(*_: object) -> None:
        if not averaging.synchronous:
            model.require_backward_grad_sync = False
            model._static_graph_delay_allreduce_enqueued = True  # else static_graph sends one bitmap in its first backward
            after.remove()

    after = averaging.optimizer.register_step_post_hook(finish)
    finish()


def refuse_join(model: DistributedDataParallel) -> None:
    """From now on ``model.join()`` raises ``ConfigError``, at once and on every rank."""
    model.join = model.join_hook = _refuse_join


def _refuse_join(*_: object, **__: object) -> None:
    raise ConfigError("DDP.join()", "as many steps on every rank",
                      "a join, whose idle ranks answer for gradients and not for averages", "remove it, and on a rank that has run out of batches call attachment.skip_step() in place of "
                      "optimizer.step() until the others are done")
