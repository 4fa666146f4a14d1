"""``deslo probe``, under torchrun: how fast is the link between replicas?"""

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer

from deslo_plugin.cli.config_file import given
from deslo_plugin.cli.launcher import groups_of, leave, world
from deslo_plugin.cli.output import Json, command, show, show_json
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.comm.topology import Topology, spread
from deslo_plugin.errors import ConfigError
from deslo_plugin.planning.link_probe import Measured
from deslo_plugin.planning.link_probe import probe as measure

START = "torchrun --nproc_per_node 8 ... -m deslo_plugin.cli"


@command
def probe(
    config: Annotated[
        Path | None, typer.Option(help="JSON or YAML with the deslo block: its replicas are measured.")
    ] = None,
    replica_size: Annotated[int | None, typer.Option(min=1, help="In place of it: ranks of one replica.")] = None,
    mb: Annotated[int, typer.Option(min=1, help="MiB that each rank averages in one round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    as_json: Json = False,
) -> None:
    """Bandwidth and latency between replicas, measured with the all-reduces that averages use. Start it with
    torchrun."""
    if "RANK" not in os.environ:
        raise ConfigError(
            "deslo probe", "the processes of a launcher", "one process", f"write: {START} probe --config FILE"
        )
    with world() as device:
        if config is not None and replica_size is not None:
            raise ConfigError("--replica-size", "it or --config", "both", "keep one")
        deslo = given(config).config.deslo
        groups = groups_of(deslo if replica_size is None else replace(deslo, replica_size=replica_size))
        if groups.topology.replicas == 1:
            raise ConfigError(
                "deslo probe",
                "two replicas or more",
                f"one of {groups.topology.replica_size} rank(s)",
                "start more ranks, or give a smaller --replica-size",
            )
        measured = measure(groups, device, nbytes=mb << 20, rounds=rounds, host=deslo.transport == "host")
        hosts = hosts_of(groups.topology)
    if as_json:
        show_json(as_dict(measured, groups.topology, hosts))
    else:
        show(*lines(measured, groups.topology, hosts))
    leave(0)


def hosts_of(topology: Topology) -> list[str]:
    """The node of each of ``topology.ranks``. Collective."""
    hosts = all_gather_by_rank(socket.gethostname())
    return [hosts[rank] for rank in topology.ranks]


def as_dict(measured: Measured, topology: Topology, hosts: Sequence[str]) -> dict[str, Any]:
    """What ``deslo plan --link`` reads, with how it was measured."""
    return {
        "gbit_per_s": measured.gbit_per_s.median,
        "latency_ms": measured.latency_ms.median,
        "quartiles": {
            "gbit_per_s": list(asdict(measured.gbit_per_s).values())[1:],
            "latency_ms": list(asdict(measured.latency_ms).values())[1:],
        },
        "replicas": topology.replicas,
        "replica_size": topology.replica_size,
        "rounds": measured.rounds,
        "bytes_per_rank": measured.bytes_per_rank,
        "backend": dist.get_backend(),
        "hosts": list(hosts),
        "warnings": placement(topology, hosts) + unsteadiness(measured),
    }


def lines(measured: Measured, topology: Topology, hosts: Sequence[str]) -> list[str]:
    rate, latency = measured.gbit_per_s, measured.latency_ms
    return [
        f"{topology.replicas} replica(s) of {topology.replica_size} rank(s) on {len(set(hosts))} node(s), "
        f"{dist.get_backend()}",
        f"bandwidth of a replica: {rate.median:.4g} Gbit/s (quartiles {rate.low:.4g} to {rate.high:.4g})",
        f"latency of an all-reduce: {latency.median:.3g} ms (quartiles {latency.low:.3g} to {latency.high:.3g})",
        f"{measured.rounds} rounds of {measured.bytes_per_rank / (1 << 20):g} MiB from every rank, as 2 b/B (1 - "
        f"1/M) + l",
        *(f"warning: {each}" for each in placement(topology, hosts) + unsteadiness(measured)),
    ]


def unsteadiness(measured: Measured) -> list[str]:
    return (
        ["samples differ widely: something else uses the link or the processors; measure again"]
        if measured.unsteady
        else []
    )


def placement(topology: Topology, hosts: Sequence[str]) -> list[str]:
    """What is wrong with where replicas lie."""
    found = [complaint] if (complaint := spread(topology, hosts)) else []
    if len(set(hosts)) == 1:
        found.append("all ranks are on one node: this is its memory and loopback, not a network")
    return found
