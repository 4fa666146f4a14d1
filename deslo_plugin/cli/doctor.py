"""``deslo doctor``: is everything here that a job needs, does it fit together, and is it really running?"""

import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.markup import escape

from deslo_plugin.cli import doctor_checks as checks
from deslo_plugin.cli.config_file import given
from deslo_plugin.cli.doctor_checks import OK, WARNING, WRONG, Check
from deslo_plugin.cli.launcher import groups_of, leave, world
from deslo_plugin.cli.output import FAILED, Json, command, show, show_json, table
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError

COLOURS = {OK: "green", WARNING: "yellow", WRONG: "bold red"}


@command
def doctor(
    config: Annotated[
        Path | None, typer.Option(help="The job's JSON or YAML: two steps of it are taken on fake data.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Versions, kernels, replicas, the link and two real steps of a config. Start it alone, or with torchrun like the
    job.

    Status 1 if anything is wrong on any rank.
    """
    with redirect_stdout(sys.stderr), world() as device:  # frameworks print; what is asked for comes alone
        found = _tried("versions", checks.versions) + _tried("kernels", lambda: [checks.kernels(device)])
        found += _tried("config", lambda: _with_config(config, device))
    everywhere = _merged(found)
    if as_json:
        show_json(
            {"ok": all(each.status != WRONG for each in everywhere), "checks": [asdict(each) for each in everywhere]}
        )
    else:
        show(
            table(
                "deslo doctor",
                ("what", "", "found"),
                [
                    (
                        each.name,
                        f"[{COLOURS[each.status]}]{each.status}[/]",
                        escape("; ".join(filter(None, (each.found, each.do)))),
                    )
                    for each in everywhere
                ],
                words=3,
            )
        )
    leave(FAILED if any(each.status == WRONG for each in everywhere) else 0)


def _with_config(path: Path | None, device: torch.device) -> list[Check]:
    file = given(path)
    found = _tried("replicas", lambda: _between_replicas(file.config, device)) if dist.is_initialized() else []
    return found + (_tried("steps", lambda: checks.steps(file.blocks, device)) if path is not None else [])


def _between_replicas(config: Config, device: torch.device) -> list[Check]:
    groups = groups_of(config.deslo)
    found = [checks.topology(groups)]
    if groups.topology.replicas > 1:
        found.append(checks.link(groups, device, host=config.deslo.transport == "host"))
    return found


def _tried(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """What ``look`` finds, or what it raised: the checks after it are still made."""
    try:
        return look()
    except ConfigError as error:
        return [Check(name, WRONG, str(error))]
    except Exception as error:  # whatever a framework raises is a finding
        return [Check(name, WRONG, f"{type(error).__name__}: {error}", traceback.format_exc().splitlines()[-3].strip())]


def _merged(found: list[Check]) -> list[Check]:
    """This rank's checks, and of other ranks those that are wrong there and not here. Collective."""
    if not dist.is_initialized():
        return found
    known, merged = {each.name for each in found if each.status == WRONG}, list(found)
    for rank, theirs in sorted(all_gather_by_rank([asdict(each) for each in found]).items()):
        worse = [each for each in (Check(**each) for each in theirs) if each.status == WRONG and each.name not in known]
        merged += [replace(each, name=f"{each.name}, rank {rank}") for each in worse]
    return merged
