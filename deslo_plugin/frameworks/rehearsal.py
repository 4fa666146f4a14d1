"""What averages will need is made at the start: a job that lacks it ends now, and not hours later in its first average
of everything at once."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deslo_plugin.attachment import Attachment
from deslo_plugin.comm.exchange import open_exchange
from deslo_plugin.comm.host_transport import HostTransport
from deslo_plugin.comm.process_groups import all_gather_by_rank, open_groups
from deslo_plugin.errors import ConfigError, require


def rehearse(attachment: Attachment, averaged: Sequence[Tensor]) -> None:
    """Opens the communicators, and on a GPU takes and gives back the memory of all averages in flight. Collective.
    ``averaged`` are parameters as this rank holds them.

    Raises ``ConfigError`` for ranks that do not reach each other, and for memory that is not there."""
    if not averaged:
        return
    device = averaged[0].device
    by_host = isinstance(attachment.averaging.transport, HostTransport)
    open_groups(attachment.groups, device, averages=not by_host)
    groups, deslo = attachment.groups, attachment.config.deslo
    if deslo.wire.quantizes and groups.topology.replicas > 1:
        open_exchange(require(groups.replica), require(groups.world), deslo.timeout_s, device)
    if device.type == "cuda":
        reserve(attachment, device)


def refuse_empty_fragments(fragments: int, averaged: Sequence[Tensor], world: dist.ProcessGroup | None) -> None:
    """Raises ``ConfigError`` on every rank where no rank has an element of ``averaged`` for each of ``fragments``.
    Collective where they are several."""
    own = sum(tensor.numel() for tensor in averaged)
    if fragments > 1:
        most = max(all_gather_by_rank(own, world).values()) if world is not None else own
        if most < fragments:
            where, got = f"at most {most}, as many as a rank has elements", str(fragments)
            raise ConfigError("deslo.fragments", where, got, "lower it, or remove it: this model needs none")


def reserve(attachment: Attachment, device: torch.device) -> None:
    """Takes the memory of all averages in flight at once, as it will be asked for, so that it lies ready afterwards."""
    plan = attachment.plan
    sizes = (
        [plan.flight_bytes]
        if plan.config.deslo.fragments > 1
        else [
            sum(group.fragment_memory[state])
            for group in plan.groups
            for state, period in group.periods.items()
            if period
        ]
    )
    try:
        taken = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            "attach: memory for averages in flight",
            f"{plan.flight_bytes:,} bytes on {device} while all states travel at once",
            f"{free:,} free of {total:,}",
            "give the states different periods that seldom meet, set deslo.sync_delay to 1, take smaller batches, or "
            "shard the model over more ranks of a replica",
        ) from error
    del taken
