"""What averages cost on a link, known before the first step: bytes, seconds waited, hours, memory. Arithmetic alone.

The model is the papers' (arXiv 2505.22549): a ring all-reduce of b bytes over M replicas takes 2 b/B (1 - 1/M) + l, and
D tokens are computed in 6 d D / (MFU S). Added to it is when an average starts, and when it is waited for.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, lcm

from deslo_plugin.algorithm.adaptive_periods import adaptive, shortest
from deslo_plugin.algorithm.fragments import offsets
from deslo_plugin.algorithm.state_names import GRADIENTS
from deslo_plugin.errors import require
from deslo_plugin.planning.plan import Plan

BACKWARD = 2 / 3  # of a step: what gradients can hide under at best, when each leaves as soon as it is there
STATE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Link:
    """What the ranks of one replica share towards the others: ``gbit_per_s``, 1e9 bits of payload a second in each
    direction; ``latency_s``, the seconds of an all-reduce of next to nothing."""

    gbit_per_s: float
    latency_s: float = 0.0

    def seconds(self, nbytes: float, replicas: int, calls: int = 1) -> float:
        """Of ``calls`` ring all-reduces of ``nbytes`` in all over ``replicas``: 2 b/B (1 - 1/M) + l each."""
        return 2 * 8 * nbytes / (self.gbit_per_s * 1e9) * (1 - 1 / replicas) + calls * self.latency_s


@dataclass(frozen=True)
class Transfer:
    """What starts to travel after ``steps`` steps: bytes of one rank by state, in ``calls`` all-reduces."""

    steps: int
    bytes: Mapping[str, int]
    calls: int


@dataclass(frozen=True)
class Forecast:
    """``steps`` steps on each replica: seconds computed, waited for averages (``exposed_s``), and waited at most at
    once (``longest_s``); ``asked_s`` were waited for the word that they may land. Averages and bytes of one rank by
    state, as its ``Meter`` counts them."""

    steps: int
    compute_s: float
    exposed_s: float
    asked_s: float
    longest_s: float
    bytes: Mapping[str, int]
    events: Mapping[str, int]

    @property
    def hours(self) -> float:
        return (self.compute_s + self.exposed_s) / 3600

    @property
    def utilisation(self) -> float:
        """Share of the time in which the replica computes."""
        return self.compute_s / (self.compute_s + self.exposed_s)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, beside parameters and gradients: ``states``, with what averages in few bits go by, and copies
    in flight, at most, as averages need them."""

    states: int
    in_flight: int


def compute_seconds(params: float, tokens: float, flops: float, mfu: float) -> float:
    """6 d D / (MFU S): of ``tokens`` on ranks that make ``flops`` floating-point operations a second together."""
    return 6 * params * tokens / (mfu * flops)


def transfers(plan: Plan, steps: int) -> list[Transfer]:
    """The averages of the first ``steps`` steps, in order, without the warm-up's gradients; all that there may be."""
    if plan.topology.replicas == 1:
        return []
    due, moved = set[int](), list[Transfer]()
    for periods in (shortest(group.periods) for group in plan.groups):
        for state, starts in offsets(tuple(periods.items()), plan.config.deslo.fragments).items():
            own = require(periods[state])
            due.update(*(range(start or own, steps + 1, own) for start in starts))
    every = lcm(*(period for group in plan.groups for period in shortest(group.periods).values() if period))
    once: dict[int, Transfer] = {}  # all cycles are alike
    for at in (at for at in sorted(due) if at > plan.config.deslo.synchronous_steps):
        if at % every not in once:
            once[at % every] = _transfer(plan, at)
        moved.append(replace(once[at % every], steps=at))
    return moved


def travel_seconds(plan: Plan, link: Link, transfer: Transfer) -> float:
    """Until ``transfer`` has arrived, when all ranks of every replica begin it at once."""
    ranks, replicas = plan.topology.replica_size, plan.topology.replicas
    return link.seconds(sum(transfer.bytes.values()) * ranks, replicas, transfer.calls)


def forecast(
    plan: Plan, link: Link, step_s: float, steps: int, *, moved: Sequence[Transfer] | None = None, hidden_s: float = 0.0
) -> Forecast:
    """``steps`` steps that compute for ``step_s`` seconds each, on every replica alike.

    An overlapped average has ``delay`` steps before it is waited for, one that is not overlapped is waited for from its
    start, and averages queue for the link.

    Args:
        moved: ``transfers(plan, steps)``, if they are at hand.
        hidden_s: seconds of a step under which the gradients of the warm-up travel.
    """
    deslo = plan.config.deslo
    sent, events = Counter[str](), Counter[str]()
    waited, longest, words = 0.0, 0.0, 0.0
    if warm_up := min(steps, deslo.synchronous_steps) if plan.topology.replicas > 1 else 0:
        gradients = _transfer(plan, 1)
        longest = max(0.0, travel_seconds(plan, link, gradients) - hidden_s)
        waited, sent[GRADIENTS], events[GRADIENTS] = warm_up * longest, warm_up * gradients.bytes[GRADIENTS], warm_up

    lands_after = 0 if deslo.average_at == "after_step" else deslo.sync_delay
    asked = link.latency_s if deslo.overlap_comm else 0.0  # whether it may land: one word, when it is waited for
    # the time at which the link has nothing left to do; (landing step, time of arrival, transfer)
    free, flying = 0.0, deque[tuple[int, float, Transfer]]()

    def land(until: int) -> None:
        nonlocal waited, longest, words
        while flying and flying[0][0] <= until:
            at, arrival, transfer = flying.popleft()
            wait = max(0.0, arrival - at * step_s - waited) + asked
            waited, longest, words = waited + wait, max(longest, wait), words + asked
            sent.update(transfer.bytes)
            events.update(transfer.bytes.keys())

    for transfer in transfers(plan, steps) if moved is None else moved:
        land(transfer.steps)
        at = transfer.steps + lands_after
        start = (transfer.steps if deslo.overlap_comm else at) * step_s + waited
        free = max(free, start) + travel_seconds(plan, link, transfer)
        flying.append((at, free, transfer))
    land(steps)
    return Forecast(steps, steps * step_s, waited, words, longest, dict(sent), dict(events))


def memory(plan: Plan, moved: Sequence[Transfer]) -> Memory:
    """On a rank that holds the plan's elements and nothing else of the states. ``moved``: ``transfers`` of the plan."""
    opt, numel = plan.config.optimizer, sum(group.numel for group in plan.groups)
    states = max(len(group.periods) for group in plan.groups) - 1  # without the parameters
    element = 4 if opt is None else STATE_BYTES[opt.state_dtype]
    copies = 2 if plan.config.deslo.sync_delay > 1 else 1  # a late average takes off what it was launched with
    outer = 2 * 4 * numel if opt is not None and opt.outer_optimizer else 0
    flying = (sum(each.bytes.values()) - plan.words_at(each.steps).total() for each in moved)
    at_once = plan.config.deslo.fragments > 1 or plan.config.deslo.wire.quantizes
    most = plan.flight_bytes if at_once else copies * max(flying, default=0)
    return Memory(states * element * numel + outer + plan.kept_bytes, most)


def _transfer(plan: Plan, steps: int) -> Transfer:
    deslo, sent = plan.config.deslo, plan.bytes_at(steps)
    weights = len(sent) if deslo.replica_weights == "samples" and GRADIENTS not in sent else 0
    spreads = sum(len(adaptive(group.periods).keys() & sent.keys()) for group in plan.groups)
    return Transfer(
        steps, sent, weights + spreads + sum(max(1, ceil(each / (deslo.bucket_cap_mb << 20))) for each in sent.values())
    )
