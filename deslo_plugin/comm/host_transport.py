"""Averages through host memory and gloo (``deslo.transport: "host"``): nothing of them runs on the device but copies.

No kernel holds a part of the GPU while a slow link is busy, and a device-wide synchronisation between launch and
landing waits for the copy to the host alone. A chunk goes this way:

    start, in the thread that trains      copy to a host buffer, on a stream of its own
    the courier, a thread                 waits for that copy, starts gloo's all-reduce of the buffer
    wait, in the thread that trains       waits for gloo, starts the copy back on the current stream

There is one courier for each set of ranks, and it starts averages in the order in which they were handed to it: the
order is the same on every rank, whatever the devices do, also where several optimizers average between the same ranks.
"""

from typing import Any

from torch import Tensor

from deslo_plugin.comm.courier import Parcel, courier_between
from deslo_plugin.comm.process_groups import Groups
from deslo_plugin.comm.replica_transport import ReplicaTransport
from deslo_plugin.errors import require


class HostTransport(ReplicaTransport):
    """Means over the ranks of ``groups.replica``, through host memory. Collective over them.

    What else a replica does together, the gathering of parts over ``copies`` included, stays on its own groups.
    """

    def __init__(self, groups: Groups, *, timeout_s: float, **options: Any):
        super().__init__(groups, timeout_s=timeout_s, **options)
        self.courier = courier_between(require(groups.replica), require(groups.world), timeout_s)

    def _all_reduce(self, own: Tensor) -> Parcel:
        return self.courier.send(own)
