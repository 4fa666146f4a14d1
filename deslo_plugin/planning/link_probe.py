"""The link between replicas, measured with the all-reduces that averages use, all shards of all replicas at once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch
import torch.distributed as dist

from deslo_plugin.comm.host_transport import HostTransport
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.comm.replica_transport import ReplicaTransport
from deslo_plugin.planning.forecast import Link

SMALL_CALLS = 20  # back to back in one sample, so that ranks that begin apart do not count
UNSTEADY = 0.2  # from one quartile to the other, of the median
WARM_UP = 2  # samples that nobody counts: connections open, memory is pinned


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of samples."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """``gbit_per_s`` of one replica towards the others, all its ranks together; ``latency_ms`` of one all-reduce of 4
    bytes."""

    gbit_per_s: Quartiles
    latency_ms: Quartiles
    replicas: int
    bytes_per_rank: int
    rounds: int

    @property
    def unsteady(self) -> bool:
        """Whether samples differ so much that something else uses the link or the processors."""
        return self.gbit_per_s.high - self.gbit_per_s.low > UNSTEADY * self.gbit_per_s.median


def probe(
    groups: Groups, device: torch.device, *, nbytes: int, rounds: int, timeout_s: float = 60.0, host: bool = False
) -> Measured:
    """B and l of 2 b/B (1 - 1/M) + l, from ``rounds`` samples each of ``nbytes`` float32 from every rank.

    ``host``: by way of host memory, as with ``deslo.transport: "host"``. Needs two replicas or more. Collective over
    all ranks; every rank gets the same answer. Raises ``AverageError`` if a rank does not answer within ``timeout_s``
    seconds.
    """
    topology = groups.topology
    average = (HostTransport if host else ReplicaTransport)(groups, timeout_s=timeout_s)
    small, large = (torch.zeros(numel, dtype=torch.float32, device=device) for numel in (1, max(1, nbytes // 4)))

    def calls(chunk: torch.Tensor, count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                average.start(chunk).wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    latency = [seconds / SMALL_CALLS for seconds in _samples(groups, calls(small, SMALL_CALLS), rounds)]
    typical = median(latency)
    moved = Link(1.0).seconds(large.nbytes * topology.replica_size, topology.replicas)  # seconds at 1 Gbit/s
    bandwidth = [moved / max(seconds - typical, 1e-9) for seconds in _samples(groups, calls(large, 1), rounds)]
    return Measured(
        _spread(bandwidth), _spread([1e3 * each for each in latency]), topology.replicas, large.nbytes, rounds
    )


def _samples(groups: Groups, run: Callable[[], None], rounds: int) -> list[float]:
    """Seconds of each round, of the rank that needed longest."""
    mine = []
    for _ in range(WARM_UP + rounds):
        dist.barrier(group=groups.world)
        start = time.perf_counter()
        run()
        mine.append(time.perf_counter() - start)
    return [max(each) for each in zip(*all_gather_by_rank(mine[WARM_UP:], groups.world).values())]


def _spread(samples: list[float]) -> Quartiles:
    low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Quartiles(median(samples), low, high)
