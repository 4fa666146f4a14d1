"""What the same runs would take over a slow link: the planner's arithmetic, not a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deslo_plugin import load_config
from deslo_plugin.planning.comparison import HIDDEN, Job, methods
from deslo_plugin.planning.forecast import Link

if TYPE_CHECKING:
    from .report import Result

GBIT_PER_S = (0.1, 1.0, 10.0)


def on_links(results: Sequence[Result], config: Mapping[str, Any], steps: int) -> dict[str, list[str]]:
    """A label for each link -> seconds of each run, by the time that a step of the first run computes.

    The second run is synchronous; its gradients travel under the backward, as far as they fit.
    """
    first = results[0]
    if first.replicas == 1 or first.seconds_exposed is None:
        return {}
    step_s = (first.seconds - first.seconds_exposed) / steps
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[first.gradient_dtype]
    numel = first.synchronous_bytes // steps // width * first.replica_size
    job = Job(load_config(config), numel, first.replicas, first.replica_size, step_s, steps, first.gradient_dtype)
    own, *others = methods(job)
    runs = [own, *(each for each in others if each.name == HIDDEN)][: len(results)]
    return {
        f"seconds over {gbit:g} Gbit/s, planned": [
            f"{runs[seat].on(Link(gbit)).hours * 3600:.1f}" for seat in range(len(runs))
        ]
        for gbit in GBIT_PER_S
    }
