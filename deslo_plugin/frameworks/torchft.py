"""Replicas that come and go: averages by torchft's ``Manager``, whose quorum says who takes part in each of them.

torchft: https://github.com/meta-pytorch/torchft (0.2)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deslo_plugin.attachment import Attachment, register
from deslo_plugin.averaging.last_average import LastAverage
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checkpoint.resharding import is_sharded, reshard
from deslo_plugin.checks.module_wrappers import reducers
from deslo_plugin.comm.process_groups import Groups
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.ddp import refuse_join
from deslo_plugin.frameworks.fsdp2 import reshard_at_steps
from deslo_plugin.frameworks.live_inside import Inside
from deslo_plugin.frameworks.live_ranks import copies_inside, groups_inside, refuse_outside, refuse_unlike
from deslo_plugin.frameworks.live_source import read_as_data
from deslo_plugin.frameworks.live_state import Replica
from deslo_plugin.frameworks.live_transport import LiveTransport, MeanOfAll
from deslo_plugin.frameworks.parameter_kinds import refuse_kinds
from deslo_plugin.frameworks.plain import Module
from deslo_plugin.frameworks.requested import refuse_together
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.log import announce

MANAGER: dict[str, tuple[object, str]] = {  # what a manager must be given, and why
    "use_async_quorum": (False, "a replica takes over another's state between two steps"),
    "init_sync": (False, "replicas start equal, which is checked"),
}
DESLO: dict[str, tuple[object, ...]] = {
    "synchronous_steps": (0,),
    "sync_delay": (1,),
    "replica_weights": ("uniform",),
    "initial_params": ("auto", "check"),
    "state_dict": ("last_average", "refuse"),  # what averaged_state_dict gives
    "transport": ("device",),  # the manager's process group carries averages
    "telemetry": (None,),  # files are named by replica
}


class TorchFT(Module):
    """A model on the ranks of one replica, bare on one, in FSDP2 or DDP on several, of which other replicas come and
    go: the transport is torchft's, and so is the way in which replicas become equal."""

    live = True

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, manager: Any, others: Sequence[Any]
    ):
        if any(other is not None for other in others):
            raise ConfigError(
                "attach(manager=...)", "no mesh, replicate or process_group beside it", "one", "remove it"
            )
        super().__init__(model, optimizer, config)
        if not self.first:
            raise ConfigError(
                "attach(manager=...)", "one optimizer for the model", "a second one", "give one all parameters"
            )
        self.manager = manager

    def groups(self) -> Groups:
        """Those of the ranks of this replica. Collective over them. Raises ``ConfigError`` on each of them for what
        does not go with replicas that come and go."""
        groups = groups_inside(self.manager)
        if groups.world is None:
            self._refuse(groups)
        else:
            refuse_together(lambda: self._refuse(groups), groups.world)
        reshard(self.model)
        refuse_unlike(self.model, groups)
        return groups

    def _refuse(self, groups: Groups) -> None:
        refuse_kinds(self.around, self.optimizer)
        for name, (wanted, why) in MANAGER.items():
            got = getattr(self.manager, f"_{name}", "none, as in another torchft")
            if got != wanted:
                raise ConfigError(f"torchft.Manager({name}=...)", str(wanted), str(got), f"give it: {why}")
        for key, allowed in (DESLO | {"replica_size": ("auto", groups.topology.replica_size)}).items():
            got = getattr(self.config.deslo, key)
            if got not in allowed:
                raise ConfigError(f"deslo.{key}", f"{allowed[-1]} with a torchft manager", str(got), "remove it")
        if (optimizer := self.config.optimizer) and (outer := optimizer.outer_optimizer) and outer.lr is None:
            raise ConfigError(
                "optimizer.params.outer_optimizer.lr",
                "a number with a torchft manager",
                "none",
                "write one: the default goes by the number of replicas, which comes and goes",
            )
        if self.config.deslo.wire.quantizes:
            raise ConfigError(
                "deslo.wire_dtype",
                '"float32" with a torchft manager',
                "states in few bits",
                "remove it: a manager adds up what it is given, and codes with scales of their own have no sum",
            )
        self.unread = read_as_data(getattr(self.manager, "_checkpoint_transport", None))
        refuse_outside(self.around, self.model, groups.topology.replica_size)

    def transport(self, groups: Groups) -> tuple[LiveTransport, None]:
        device = local([next(self.around.parameters())])[0].device
        self.inside = Inside(groups, copies_inside(self.around, self.model))
        self.live_transport = LiveTransport(
            self.manager, self.inside, self.unread, timeout_s=self.config.deslo.timeout_s, device=device
        )
        return self.live_transport, None

    def average_buffers(self, averaging: StateAverager, groups: Groups) -> None:
        if self.buffers:
            averaging.add_buffers(self.buffers, MeanOfAll(self.live_transport))

    def keep_gradients_inside(self, averaging: StateAverager, groups: Groups) -> None:
        """They never leave the world of this process, which is one replica."""
        for each in reducers(self.around):
            refuse_join(each)
        if is_sharded(self.model):
            reshard_at_steps(self.model, averaging)

    def gradient_bytes(self, divisor: int) -> None:
        return None

    def install(self, attachment: Attachment) -> None:
        averaging, optimizer = attachment.averaging, self.config.optimizer
        averaging.members.names = {param: name for name, param in self.named.items()}
        if self.config.deslo.state_dict == "last_average":
            averaging.kept = LastAverage(bool(optimizer and optimizer.outer_optimizer))
            averaging.keep()
        replica = Replica(self.model, averaging, self.config, self.inside.size)
        self.live_transport.represent(replica, greet=lambda: announce(attachment.plan.describe()))
        register(attachment, self.optimizer, self.model)
