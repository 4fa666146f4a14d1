"""Replicas that come and go: averages by torchft's ``Manager``, whose quorum says who takes part in each of them.

torchft: https://github.com/meta-pytorch/torchft (0.2)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deslo_plugin.attachment import Attachment, register
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checkpoint.resharding import is_sharded
from deslo_plugin.checks.module_wrappers import reducers
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.live_transport import LiveTransport, Replica
from deslo_plugin.frameworks.parameter_kinds import refuse_kinds
from deslo_plugin.frameworks.plain import Module
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.log import announce

MANAGER: dict[str, tuple[object, str]] = {  # what a manager must be given, and why
    "use_async_quorum": (False, "a replica takes over another's state between two steps"),
    "init_sync": (False, "replicas start equal, which is checked"),
    "group_world_size": (1, "a replica is one rank here"),
}
DESLO: dict[str, tuple[object, ...]] = {
    "synchronous_steps": (0,),
    "sync_delay": (1,),
    "fragments": (1,),  # replicas would never be equal at one step
    "replica_weights": ("uniform",),
    "initial_params": ("auto", "check"),
    "replica_size": ("auto", 1),
    "state_dict": ("refuse",),
    "transport": ("device",),  # the manager's process group carries averages
    "telemetry": (None,),  # files are named by replica
}


class TorchFT(Module[None]):
    """A bare model that is one replica, of which others come and go: the transport is torchft's, and so is the way in
    which replicas become equal."""

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

    def groups(self) -> None:
        """None. Raises ``ConfigError`` for what does not go with replicas that come and go."""
        refuse_kinds(self.around, self.optimizer)
        for name, (wanted, why) in MANAGER.items():
            got = getattr(self.manager, f"_{name}", "none, as in another torchft")
            if got != wanted:
                raise ConfigError(
                    f"torchft.Manager({name.removeprefix('group_')}=...)", str(wanted), str(got), f"give it: {why}"
                )
        for key, allowed in DESLO.items():
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
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several or reducers(self.around) or is_sharded(self.model):
            raise ConfigError(
                "attach(manager=...)",
                "a bare model in a process of its own, which is one replica",
                "a wrapped model or a world of several ranks",
                "start each replica alone, without a wrapper",
            )

    def transport(self, groups: None) -> tuple[LiveTransport, None]:
        device = local([next(self.around.parameters())])[0].device
        self.live = LiveTransport(self.manager, timeout_s=self.config.deslo.timeout_s, device=device)
        return self.live, None

    def average_buffers(self, averaging: StateAverager, groups: None) -> None:
        if self.buffers:
            averaging.add_buffers(self.buffers, averaging.transport)

    def keep_gradients_inside(self, averaging: StateAverager, groups: None) -> None:
        """No gradient leaves a process of its own."""

    def gradient_bytes(self, divisor: int) -> None:
        return None

    def install(self, attachment: Attachment) -> None:
        averaging = attachment.averaging
        replica = Replica(self.around, averaging, self.config)
        self.live.represent(replica, greet=lambda: announce(attachment.plan.describe()))
        register(attachment, self.optimizer, self.model)
