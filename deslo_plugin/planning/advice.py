"""What would let training wait less, on a link: parts of averages, averages that travel longer, and longer periods."""

from dataclasses import dataclass, replace
from math import ceil, lcm

from deslo_plugin.config.schema import Config
from deslo_plugin.planning.alternatives import in_few_bits, in_fragments, most_fragments, periods_of
from deslo_plugin.planning.comparison import Job
from deslo_plugin.planning.forecast import Forecast, Link, forecast, transfers, travel_seconds

CYCLES, LONGEST = 4, 4096  # of all periods, and steps at most, that a recommendation looks at
STRETCHES = (1, 2, 4, 8, 16, 32, 64)  # of all periods


def hiding_delay(job: Job, link: Link) -> int | None:
    """The smallest ``deslo.sync_delay`` with which nothing is waited for, after the warm-up; None if no delay that the
    config may have does that."""
    config, own = job.config, job.plan()
    periods = [period for period in periods_of(config).values() if period]
    fixed = (
        not config.deslo.overlap_comm
        or config.optimizer is None
        or config.optimizer.outer_optimizer
        or config.optimizer.reset_momenta
    )
    moved = transfers(own, job.steps)
    warm_up = forecast(own, link, job.step_s, min(job.steps, config.deslo.synchronous_steps), moved=[]).exposed_s
    longest = max((travel_seconds(own, link, each) for each in moved), default=0.0)
    for delay in range(max(1, ceil(longest / job.step_s - 1e-9)), 1 + (1 if fixed else min(periods))):
        late = replace(config, deslo=replace(config.deslo, sync_delay=delay))
        seen = forecast(job.plan(late), link, job.step_s, job.steps, moved=moved)
        if seen.exposed_s - seen.asked_s <= warm_up * (1 + 1e-9) + 1e-9:
            return delay
    return None


def hiding_fragments(job: Job, link: Link) -> int | None:
    """The smallest ``deslo.fragments`` with which nothing is waited for, after the warm-up; None if none does that."""
    counts = (job.config.deslo.fragments, *_counts(job.config))
    seen = ((count, _seen(job, link, count)) for count in counts)
    return next((count for count, each in seen if each.exposed_s - each.asked_s <= 1e-9), None)


@dataclass(frozen=True)
class Reach:
    """All periods times ``stretch`` and ``fragments`` of each state, in ``few_bits`` or as the config has it, with
    which a replica computes for ``utilisation`` of its time."""

    stretch: int
    fragments: int
    utilisation: float
    few_bits: bool = False


def reach(job: Job, link: Link, target: float) -> Reach | None:
    """The shortest periods, for them states as they are rather than in few bits, and for those the fewest fragments,
    with which a replica computes for ``target`` of its time once the warm-up is over; None if none of those that are
    looked at do."""
    for stretch in STRETCHES:
        longer = _stretched(job.config, stretch)
        fewer = in_few_bits(longer)
        for config in (longer, fewer) if fewer != longer else (longer,):
            for count in (config.deslo.fragments, *_counts(config)):
                found = _seen(replace(job, config=config), link, count).utilisation
                if found >= target:
                    return Reach(stretch, count, found, few_bits=config is not longer)
    return None


def _counts(config: Config) -> list[int]:
    """Fragments that may be tried, from few to many."""
    most = most_fragments(config)
    return [*(1 << power for power in range(1, most.bit_length()) if 1 << power < most), most] if most > 1 else []


def _seen(job: Job, link: Link, fragments: int) -> Forecast:
    """Of a replica in ``fragments``, over some cycles of all periods after the warm-up."""
    deslo = replace(job.config.deslo, synchronous_steps=0)
    config = in_fragments(replace(job.config, deslo=deslo), fragments)
    steps = min(CYCLES * lcm(*filter(None, periods_of(config).values())), LONGEST)
    return forecast(job.plan(config), link, job.step_s, steps)


def _stretched(config: Config, times: int) -> Config:
    longer = {state: period and period * times for state, period in periods_of(config).items()}
    if config.optimizer is None:
        return replace(config, deslo=replace(config.deslo, sync_every=longer))
    return replace(config, optimizer=replace(config.optimizer, periods=longer))
