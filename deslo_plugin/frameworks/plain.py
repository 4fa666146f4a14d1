"""A bare module, of which every rank is a replica, or the ranks of a mesh that do not run across replicas."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.attachment import Attachment, all_of_models, attachment_of, register
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checkpoint.resharding import reshard
from deslo_plugin.checkpoint.state_dict_guard import refuse_one_replica
from deslo_plugin.checkpoint.state_tree import TorchState
from deslo_plugin.checks import module_wrappers as wrappers
from deslo_plugin.checks.replica_checks import broadcast_or_check_params, listed, model_traits, refuse_parts
from deslo_plugin.checks.replica_parts import agree_on_parts, holders_of
from deslo_plugin.comm.consistency import first_to_say
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank, make_groups, reachable
from deslo_plugin.comm.topology import Topology, contiguous
from deslo_plugin.comm.transport import SingleReplica, Transport
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.frameworks.base import Framework
from deslo_plugin.frameworks.gradient_warmup import GradientAveraging
from deslo_plugin.frameworks.gradients_inside import MeanInside, place_as_parameters
from deslo_plugin.frameworks.parameter_kinds import refuse_kinds, refuse_nonfinite
from deslo_plugin.frameworks.requested import refuse_together
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.log import log_rank0
from deslo_plugin.planning.route import Route
from deslo_plugin.planning.transport_choice import choose_route, make_transport
from deslo_plugin.planning.wire_cost import BYTES

REPLICATE = ("replicate", "dp_replicate")  # names under which the dimension across replicas is looked for


class Module(Framework):
    """A model and its optimizer, whether or not its replicas come and go."""

    state_adapter = TorchState

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        mesh: DeviceMesh | None = None,
        replicate: str | None = None,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.around, self.model, self.optimizer, self.config = model, wrappers.bare(model), optimizer, config
        self.mesh, self.replicate, self.process_group = mesh, replicate, process_group
        self.first = attachment_of(self.model) is None
        self.param_groups = optimizer.param_groups
        averaged = {id(buffer) for each in all_of_models() for buffer in each.averaging.buffers}  # models may be shared
        floating = [each for each in wrappers.saved_buffers(self.model).values() if each.is_floating_point()]
        self.buffers: Tensors = [each for each in floating if id(each) not in averaged]

    @property
    def named(self) -> Mapping[str, Tensor]:
        """Parameters of the model, and what else the optimizer steps, such as those of a loss."""
        named = dict(self.model.named_parameters())
        known = set(map(id, named.values()))
        others = (
            (f"{index} of param group {number}", param)
            for number, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
        )
        return named | {name: param for name, param in others if id(param) not in known}


class Plain(Module):
    """What every wrapper of torch has in common; one that reduces gradients by itself says where, and stops it."""

    def groups(self) -> Groups:
        config, model, topology = self.config, self.model, self.topology()
        if config.deslo.replica_size not in ("auto", topology.replica_size):
            raise ConfigError(
                "deslo.replica_size",
                f"{topology.replica_size}, as the model and its mesh have it",
                str(config.deslo.replica_size),
                "remove it, or wrap the model in DDP or FSDP2, which reduce gradients inside a replica",
            )
        # whether averages carry tensors on the CPU, on any rank
        tensors = [*self.named.values(), *wrappers.saved_buffers(model).values()]
        on_cpu = all_gather_by_rank(any(each.device.type == "cpu" for each in tensors), self.process_group)
        groups = make_groups(topology, config.deslo.timeout_s, on_cpu=any(on_cpu.values()), within=self.process_group)
        refuse_together(lambda: self.refuse(topology) if topology.replicas > 1 else None, groups.world)
        reshard(model)
        whole = model_traits(model, lambda p: p.shape)
        agree_on_parts(whole, {name: self._part_of(p) for name, p in model.named_parameters()}, groups)
        refuse_together(lambda: refuse_kinds(model, self.optimizer), groups.world)
        named = self.named
        pieces = {name: param for name, param in named.items() if hasattr(param, "to_local")}
        plain = {name: param for name, param in named.items() if name not in pieces}
        buffers = wrappers.saved_buffers(model)
        self.holders = holders_of([*named, *buffers], groups)

        def on_each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """Those that every rank of a replica has."""
            size = topology.replica_size
            return {name: each for name, each in tensors.items() if self.holders.get(name, size) == size}

        self.alike = {name: param for name, param in plain.items() if self.holders.get(name, topology.replica_size) > 1}
        if (forgotten := self.forgotten()) is not None and config.deslo.initial_params != "broadcast":
            refuse_parts(plain, groups, forgotten)
        shared = on_each(plain | buffers)
        own_parts = {name: each for name, each in (plain | buffers).items() if name not in shared}
        broadcast_or_check_params(
            shared,
            own_parts | dict(zip(pieces, local(list(pieces.values())))),
            config.deslo.initial_params,
            groups,
            lambda tensor: reachable(tensor, groups.world),
        )
        trained = {name: param for name, param in named.items() if param.requires_grad}
        refuse_together(lambda: refuse_nonfinite(trained), groups.world)
        for own in self.own_groups():
            if dist.get_process_group_ranks(own) == topology.shard_group:
                return replace(groups, shard=own)
        return groups

    def topology(self) -> Topology:
        """Which ranks are one replica. Changes nothing. Collective."""
        if self.mesh is not None:
            return topology_from_mesh(self.mesh, self.replicate)
        ranks = dist.get_process_group_ranks(self.process_group or dist.group.WORLD)
        return Topology(tuple((rank,) for rank in ranks), dist.get_rank())

    def _part_of(self, param: Tensor) -> str:
        """Which part of ``param`` this rank has, in the words of a message; "" of a plain one."""
        if not isinstance(param, DTensor):
            return ""
        ranks, own = self.ranks_of(param), dist.get_rank()
        cut = f" cut {list(param.placements)} over {len(ranks)} ranks"
        return f"{cut}, {tuple(param.to_local().shape)} of it on number {ranks.index(own)}" if own in ranks else cut

    def refuse(self, topology: Topology) -> None:
        """Raises ``ConfigError`` for what communicates, or is sharded, beyond this rank's replica."""
        wrappers.refuse_across(self.around, topology)
        for name, param in self.around.named_parameters():
            if isinstance(param, DTensor) and not set(ranks := self.ranks_of(param)) <= set(topology.shard_group):
                raise ConfigError(
                    f"attach(model) parameter {name}",
                    f"a DTensor over ranks of the replica {topology.shard_group}",
                    f"one over ranks {ranks}",
                    "shard it on dimensions inside the replica, such as "
                    'mesh["shard"], and name the one across replicas "replicate"',
                )

    def ranks_of(self, param: DTensor) -> list[int]:
        """Those that hold or reduce ``param`` once it is attached."""
        return param.device_mesh.mesh.flatten().tolist()

    def forgotten(self) -> Collection[str] | None:
        """Plain parameters that sharding has left out; None if the wrapper has made the ranks of a replica alike."""
        return ()

    def own_groups(self) -> Sequence[dist.ProcessGroup]:
        """The wrapper's, which keeps to a replica from now on: NCCL needs no second communicator for it then."""
        return ()

    def copies(self, groups: Groups) -> dist.ProcessGroup | None:
        """The ranks of a replica that hold the same values."""
        return None

    def transport(self, groups: Groups) -> tuple[Transport, Route | None]:
        route = choose_route(self.config.deslo, groups, (p for p in self.named.values() if p.requires_grad))
        return make_transport(route, groups, self.config.deslo, self.copies(groups)), route

    def average_buffers(self, averaging: StateAverager, groups: Groups) -> None:
        if self.buffers and groups.topology.replicas > 1:
            parameters: Any = averaging.transport  # a ReplicaTransport: buffers travel by another of its class
            everyone = replace(groups, replica=groups.world)
            if self.holders:  # peers have the same ones, as if they were all there is
                alone = Topology(tuple((rank,) for rank in groups.topology.replica_group), groups.topology.rank)
                everyone = replace(groups, topology=alone, world=groups.replica, shard=groups.singleton)
            averaging.add_buffers(
                self.buffers,
                type(parameters)(everyone, timeout_s=self.config.deslo.timeout_s, progress=parameters.progress),
            )

    def keep_gradients_inside(self, averaging: StateAverager, groups: Groups) -> None:
        if self.first:
            place_as_parameters(self.model.parameters())
            self._reduce_plain_ones(groups)
        if self.first and groups.topology.replicas > 1 and self.config.deslo.synchronous_steps:
            GradientAveraging(self.model, averaging)

    def _reduce_plain_ones(self, groups: Groups) -> None:
        """Of a model without DTensors nobody else reduces gradients inside a replica; in one with tensor parallelism
        what is plain has the same gradient on each rank."""
        trained = {name: param for name, param in self.named.items() if param.requires_grad}
        if groups.topology.replica_size == 1 or any(isinstance(param, DTensor) for param in self.named.values()):
            return
        if several := [name for name in trained if self.holders.get(name, 0) > 1]:
            message = (
                f"deslo: {listed(several)} are trained on several ranks of a replica, which hold other parts of the "
                "model beside them: reduce their gradients over those ranks before each step, or call fully_shard on "
                "them, else these ranks go apart"
            )
            if first_to_say(message):
                log_rank0(message, logging.WARNING, anywhere=True)
        elif not self.holders and trained:
            MeanInside(list(trained.values()), [require(groups.shard)])
            log_rank0("deslo: gradients are averaged inside a replica after every backward: nothing else reduces them")

    def gradient_bytes(self, divisor: int) -> list[int] | None:
        """In wire dtype, with a flag for each parameter."""
        numels = [sum(param.numel() + 1 for param in params) for params in self.trained_by_group()]
        return [-(-numel // divisor) * BYTES[self.config.deslo.wire.plain] for numel in numels]

    def trained_by_group(self) -> list[list[Tensor]]:
        return [[each for each in local(group["params"]) if each.requires_grad] for group in self.param_groups]

    def install(self, attachment: Attachment) -> None:
        attachment.averaging.members.names = {param: name for name, param in self.named.items()}
        register(attachment, self.optimizer, self.model)
        refuse_one_replica(attachment, self.optimizer, self.around)


class Alone(Plain):
    """A script started as one process without a launcher: the plain optimizer."""

    def groups(self) -> Groups:
        refuse_kinds(self.model, self.optimizer)
        self.buffers = ()
        return Groups(contiguous(1, 0, 1), world=None, shard=None, replica=None, singleton=None)

    def transport(self, groups: Groups) -> tuple[Transport, Route | None]:
        return SingleReplica(), None

    def gradient_bytes(self, divisor: int) -> None:
        return None


def topology_from_mesh(mesh: DeviceMesh, replicate: str | None) -> Topology:
    """The topology of a mesh over all ranks whose dimension ``replicate`` runs across replicas."""
    name = dimension_across(mesh, replicate)
    if name is None:
        raise ConfigError(
            "attach(mesh=...)",
            f"a dimension named {replicate or ' or '.join(REPLICATE)}",
            f"{mesh.mesh_dim_names}",
            "name the dimension across replicas in init_device_mesh(..., mesh_dim_names=...), or pass replicate=its "
            "name",
        )
    if mesh.size() != dist.get_world_size():
        raise ConfigError(
            "attach(mesh=...)",
            f"a mesh over all {dist.get_world_size()} ranks",
            f"one over {mesh.size()}",
            "pass the mesh that init_device_mesh returned",
        )
    across = mesh.mesh.movedim(require(mesh.mesh_dim_names).index(name), 0)
    return Topology(tuple(map(tuple, across.reshape(len(across), -1).tolist())), dist.get_rank())


def dimension_across(mesh: DeviceMesh, replicate: str | None) -> str | None:
    """The name of the dimension across replicas, if ``mesh`` has one."""
    names = mesh.mesh_dim_names or ()
    return next((name for name in ([replicate] if replicate else REPLICATE) if name in names), None)
