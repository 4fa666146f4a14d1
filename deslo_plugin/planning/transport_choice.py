"""``deslo.transport``: the way of averages is found, and the transport made that takes it."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from deslo_plugin.comm.host_transport import HostTransport
from deslo_plugin.comm.process_groups import Groups
from deslo_plugin.comm.replica_transport import ReplicaTransport
from deslo_plugin.config.schema import DesloConfig
from deslo_plugin.planning.link_probe import probe
from deslo_plugin.planning.route import Route

SLOW_GBIT = 10.0  # below it an average takes so long that it should not occupy the device: "auto" goes through the host
PROBE_BYTES, PROBE_ROUNDS, PROBE_TIMEOUT_S = 4 << 20, 3, 60.0


def choose_route(deslo: DesloConfig, groups: Groups, averaged: Iterable[Tensor]) -> Route:
    """The way of averages of ``averaged``. The same on every rank. Collective over all of them: "auto" measures
    the link between replicas."""
    if deslo.transport != "auto" or groups.topology.replicas == 1:
        return Route(deslo.transport == "host" and groups.topology.replicas > 1)
    device = next((tensor.device for tensor in averaged), None)
    if device is None or device.type == "cpu":
        return Route(False, 'transport "auto": the tensors are in host memory')
    measured = probe(
        groups, device, nbytes=PROBE_BYTES, rounds=PROBE_ROUNDS, timeout_s=min(PROBE_TIMEOUT_S, deslo.timeout_s)
    ).gbit_per_s.median
    slow = measured < SLOW_GBIT
    found = f"measured {measured:.3g} Gbit/s between replicas, {'below' if slow else 'not below'} {SLOW_GBIT:g}"
    return Route(slow, f'transport "auto": {found}')


def make_transport(
    way: Route, groups: Groups, deslo: DesloConfig, copies: dist.ProcessGroup | None = None
) -> ReplicaTransport:
    """The transport of ``way``. Collective over the ranks of ``groups.replica``."""
    return (HostTransport if way.host else ReplicaTransport)(groups, timeout_s=deslo.timeout_s, copies=copies)
