"""A real job of one param group, and what its collectives were handed: counted at ``all_reduce`` itself, and by the
meter."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from tests.support import torch_jobs
from tests.support.jobs import net

FEATURES, ROWS = next(iter(net().parameters())).shape[1], 4


def counted(wrap: str, blocks: dict[str, Any], steps: int) -> dict[str, Any]:
    """Bytes of this rank by state, forecast and from its meter, and all that it handed to reductions between
    replicas."""
    import deslo_plugin
    from deslo_plugin.planning.forecast import Link, forecast

    model, where = torch_jobs.WRAPS[wrap](net())
    optimizer = deslo_plugin.DesLoc(model.parameters(), blocks)
    attachment = deslo_plugin.attach(model, optimizer, **where)
    attachment.averaging.watch = None  # the first two averages are looked at, by digests that are no average's bytes
    handed, reduce = Counter(), dist.all_reduce

    def counting(tensor, *args, group=None, **options):
        handed[group is attachment.groups.replica] += tensor.nbytes
        return reduce(tensor, *args, group=group, **options)

    dist.all_reduce = counting
    try:
        for step in range(steps):
            if attachment.config.deslo.replica_weights == "samples":
                attachment.record_samples(ROWS)
            torch.manual_seed(10 * step + dist.get_rank())
            model(torch.randn(ROWS, FEATURES)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        dist.all_reduce = reduce
    planned = forecast(attachment.plan, Link(1), 1.0, steps).bytes
    return {
        "planned": planned,
        "meter": dict(attachment.stats.bytes),
        "handed": handed[True],
        "numel": sum(p.numel() for p in net().parameters()),
    }
