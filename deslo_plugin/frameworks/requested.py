"""What ``attach`` was asked for: refused before anything is changed, on every rank alike."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from deslo_plugin.attachment import attached_to, attachment_of
from deslo_plugin.checks import module_wrappers as wrappers
from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.config.load import as_dict, load_config
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.optim.desloc import DesLoc

W = TypeVar("W")


def checked(model: nn.Module, optimizer: Any, config: Any) -> tuple[torch.optim.Optimizer, Config]:
    """(the optimizer that steps, its config). Raises ``ConfigError`` for what cannot be attached."""
    optimizer = wrappers.bare_optimizer(optimizer)
    if attachment_of(optimizer) is not None:
        raise ConfigError("attach(optimizer)", "one call for each optimizer", "a second one", "remove it")
    wrappers.refuse(model, optimizer)
    if any(each.averaging.diverged for each in attached_to(model)):
        raise ConfigError(
            "attach(optimizer)",
            "replicas that are equal, as before the first step",
            "some that have trained",
            "attach every optimizer before the first step, or call deslo_plugin.sync_replicas(model) right before",
        )
    return optimizer, _config_of(optimizer, config)


def agreed(
    model: nn.Module,
    optimizer: Any,
    config: Any,
    mesh: DeviceMesh | None,
    group: dist.ProcessGroup | None,
    wrapper_of: Callable[[nn.Module], type[W]],
) -> tuple[torch.optim.Optimizer, Config, type[W]]:
    """As ``checked``, and what ``wrapper_of`` finds around the model; the same on every rank, or an error on every
    rank: a mistake of one must not leave the others waiting."""
    found: tuple[torch.optim.Optimizer, Config, type[W]] | ConfigError
    try:
        found = (*checked(model, optimizer, config), wrapper_of(model))
    except ConfigError as error:
        found = error
    shape = None if mesh is None else mesh.mesh.tolist()
    mine: dict[str, Any] = {"optimizer": type(optimizer).__name__, "mesh": shape}
    if isinstance(found, ConfigError):
        mine |= {"error": found}
    else:
        mine |= {"error": "", "wrapper of the model": found[2].__name__, **as_dict(found[1])}
    if mesh is None:  # else ranks may hold other parts
        mine["model"] = type(model).__name__
    check_same_on_all_ranks("attach's", mine, do="call attach alike on every rank", group=group)
    if isinstance(found, ConfigError):
        raise found
    return found


def refuse_together(check: Callable[[], object], world: dist.ProcessGroup | None) -> None:
    """What ``check`` refuses on any rank is refused on all. Collective."""
    problem = None
    try:
        check()
    except ConfigError as error:
        problem = error
    for each in all_gather_by_rank(problem, world).values():
        if each is not None:
            raise each


def _config_of(optimizer: torch.optim.Optimizer, config: Any) -> Config:
    if isinstance(optimizer, DesLoc):
        if config is not None:
            raise ConfigError(
                "attach(config=...)", "none beside a DesLoc, which has its own", "one", "give it to DesLoc"
            )
        return optimizer.config
    if config is None:
        raise ConfigError(
            "attach(config=...)",
            f"a config with deslo.sync_every for {type(optimizer).__name__}",
            "none",
            "pass the file or dict, or use deslo_plugin.DesLoc",
        )
    config = load_config(config)
    if config.deslo.sync_every is None:
        raise ConfigError(
            "attach(optimizer)",
            "a DesLoc for a config without deslo.sync_every",
            type(optimizer).__name__,
            "build DesLoc(params, config), or write the periods of this optimizer's states in deslo.sync_every",
        )
    return config
