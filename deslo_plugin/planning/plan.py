"""What moves, when, between whom, and how many bytes: known before the first step, without a process group."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from deslo_plugin.algorithm.adaptive_periods import Schedule, adaptive, longest, shortest
from deslo_plugin.algorithm.fragments import WINDOW, Due, due_fragments, offsets, sizes
from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.algorithm.schedule import Periods, vectors_per_step
from deslo_plugin.algorithm.state_names import BUFFERS, GRADIENTS, PARAMS
from deslo_plugin.comm.topology import Topology
from deslo_plugin.config.schema import Config, OptimizerConfig
from deslo_plugin.errors import require
from deslo_plugin.planning.route import Route
from deslo_plugin.planning.wire_cost import BYTES, WireCost

HORIZON = 100_000  # steps that next_sync looks ahead


@dataclass(frozen=True)
class GroupPlan:
    """One param group: ``numel`` elements on this rank. An average of fragment i of a state sends
    ``fragment_bytes[state][i]`` from it, and takes ``fragment_memory[state][i]`` bytes there; a step of the synchronous
    warm-up sends ``gradient_bytes``. Of adaptive periods nobody knows more in advance than their bounds."""

    numel: int
    fragment_bytes: Mapping[str, tuple[int, ...]]
    fragment_memory: Mapping[str, tuple[int, ...]]
    gradient_bytes: int
    periods: Schedule

    @property
    def bytes_per_event(self) -> dict[str, int]:
        """State -> what an average of all of it sends."""
        return {state: sum(parts) for state, parts in self.fragment_bytes.items()}

    def due(self, fragments: int, steps: int) -> Due:
        """What is averaged after ``steps`` steps, at the shortest period of those that adapt."""
        return due_fragments(shortest(self.periods), fragments, steps)


@dataclass(frozen=True)
class Plan:
    config: Config
    topology: Topology
    groups: tuple[GroupPlan, ...]
    buffer_bytes: int = 0
    divisor: int = 1
    route: Route = Route()

    @property
    def synchronous_bytes(self) -> int:
        """What this rank would send at every step of synchronous training, in wire dtype and split as averages are."""
        return sum(group.bytes_per_event[PARAMS] for group in self.groups)

    @property
    def flight_bytes(self) -> int:
        """Memory that averages take on this rank while most is under way."""
        buffers = self.buffer_bytes * self.divisor * (2 if self.config.deslo.sync_delay > 1 else 1)
        return self._peak([group.fragment_memory for group in self.groups], buffers)

    @property
    def kept_bytes(self) -> int:
        """Memory on this rank for what averages in few bits go by: last means and what was lost."""
        wire = self.config.deslo.wire
        copies = len(require(wire.difference)) + len(require(wire.feedback))
        return 4 * copies * sum(group.numel for group in self.groups)

    @property
    def host_bytes(self) -> int:
        """Host memory that averages through it take on this rank while most is under way."""
        return self.peak_bytes if self.route.host else 0

    @property
    def peak_bytes(self) -> int:
        """What this rank sends at most for averages that are under way at once: all states, or of fragments those that
        meet."""
        return self._peak([group.fragment_bytes for group in self.groups], self.buffer_bytes)

    def _peak(self, costs: Sequence[Mapping[str, tuple[int, ...]]], buffer_cost: int) -> int:
        """The most of ``costs``, those of the param groups, at once."""
        cost_of = {id(group): cost for group, cost in zip(self.groups, costs)}
        averaged = [(group, state) for group in self.groups for state, period in group.periods.items() if period]
        if self.config.deslo.fragments == 1:
            return sum(sum(cost_of[id(group)][state]) for group, state in averaged) + buffer_cost
        window = min(lcm(*(require(shortest(group.periods)[state]) for group, state in averaged)), WINDOW)
        load = [0] * window
        for group, state in averaged:
            periods = shortest(group.periods)
            starts = offsets(tuple(periods.items()), self.config.deslo.fragments)[state]
            for index, (start, cost) in enumerate(zip(starts, cost_of[id(group)][state])):
                buffers = buffer_cost if state == PARAMS and index == 0 and group is self.groups[0] else 0
                for step in range(start, window, require(periods[state])):
                    load[step] += cost + buffers
        delay = self.config.deslo.sync_delay
        return max(sum(load[step - ahead] for ahead in range(delay)) for step in range(window))

    @property
    def vectors_per_step(self) -> float:
        """Parameter vectors moved between replicas per step, at most; synchronous training moves 1."""
        return self._vectors_per_step(shortest)

    def _vectors_per_step(self, at: Callable[[Schedule], Periods]) -> float:
        total = sum(group.numel for group in self.groups) or 1
        return sum(group.numel * vectors_per_step(at(group.periods)) for group in self.groups) / total

    def bytes_at(self, steps: int) -> dict[str, int]:
        """State -> bytes that this rank sends for the averages due after ``steps`` completed steps.

        With what is due of a group goes one word, by which replicas learn whether any has written into it (``recall``).
        A state whose period adapts is counted wherever it may be due: at its shortest period.
        """
        if steps <= self.config.deslo.synchronous_steps:
            return {GRADIENTS: sum(group.gradient_bytes for group in self.groups)} if steps > 0 else {}
        sent: Counter[str] = Counter()
        fragments, first = self.config.deslo.fragments, False
        for group in self.groups:
            due = group.due(fragments, steps)
            first |= PARAMS in due.get(0, ())  # with which buffers travel
            for index, states in due.items():
                sent.update({state: group.fragment_bytes[state][index] for state in states})
        sent.update(self.words_at(steps))
        return dict(sent) | ({BUFFERS: self.buffer_bytes} if self.buffer_bytes and first else {})

    def words_at(self, steps: int) -> Counter[str]:
        """Those of ``bytes_at`` that are words beside averages, counted as the first state of each group's that is
        due."""
        word, words = BYTES[self.config.deslo.wire.plain], Counter[str]()
        for group in self.groups:
            for states in group.due(self.config.deslo.fragments, steps).values() if group.numel else ():
                words[states[0]] += word
        return words

    def next_sync(self, steps: int) -> tuple[int, tuple[str, ...]] | None:
        """(steps from now, states) of the next average after ``steps`` completed steps; None if none is near."""
        for ahead in range(1, HORIZON):
            if states := self.bytes_at(steps + ahead):
                return ahead, tuple(states)
        return None

    def describe(self) -> str:
        """The banner: topology, rule, and for each state its period, why, bytes per event and per step."""
        t, opt, deslo = self.topology, self.config.optimizer, self.config.deslo
        order = deslo.average_at + (", overlapped" if deslo.overlap_comm else "")
        order += f" with {deslo.sync_delay} steps" if deslo.sync_delay > 1 else ""
        order += f", in {deslo.fragments} fragments" if deslo.fragments > 1 else ""
        order += ", replicas weighted by samples" if deslo.replica_weights == "samples" else ""
        lines = [f"deslo: {t.replicas} replica(s) of {t.replica_size} rank(s); {_direction(opt)}; {order}"]
        if t.replicas == 1:
            alone = "this is the plain optimizer"
            if opt is not None and opt.outer_optimizer:
                every = f"every {opt.periods[PARAMS]} steps an outer Nesterov step on its parameters"
                alone = f"{every}, {opt.outer_optimizer.describe(1)}"
            return f"{lines[0]}\n  one replica only: nothing to average, {alone}"
        if opt is not None and RULES[opt.rule].bounds_momenta:
            lines += [
                f"  beware: beta {beta:g} outlives beta2 {opt.beta2:g}, with which Adam can diverge; take beta2 above "
                f"{beta**2:.4g}, or adopt"
                for beta in dict.fromkeys((*opt.betas, *opt.after_switch.betas))
                if beta**2 >= require(opt.beta2)
            ]
        if switch := self.config.switch:
            lines.append(f"  switch after step {switch.at:,}: {_direction(opt and opt.after_switch)}; {switch.change}")
        if deslo.synchronous_steps:
            each = sum(group.gradient_bytes for group in self.groups)
            lines.append(
                f"  gradients: at each of the first {deslo.synchronous_steps} steps, {each:,} bytes from each rank"
            )
        for index, group in enumerate(self.groups):
            name = f" of param group {index}" if len(self.groups) > 1 else ""
            rules = [] if opt is None else opt.by_rule.values()
            rule = next((each for each in rules if each.periods.keys() == group.periods.keys()), opt)
            for state, period in group.periods.items():
                source = "given" if rule is None else rule.period_sources[state]
                if rule is not None and period != rule.periods[state]:
                    source = "its own period"
                every = (
                    f"every {period} steps" if isinstance(period, int) else str(period) if period else "never averaged"
                )
                sent = f", {group.bytes_per_event[state]:,} bytes from each rank" if period else ""
                lines.append(f"  {state + name}: {every} ({source}){sent}")
        if self.buffer_bytes:
            lines.append(
                f"  floating persistent buffers: with the parameters, {self.buffer_bytes:,} bytes from each rank"
            )
        if deslo.wire.quantizes:
            lines.append(f"  {self._in_few_bits()}")
        if opt is not None and opt.outer_optimizer:
            lines.append(f"  outer Nesterov step on averaged params: {opt.outer_optimizer.describe(t.replicas)}")
        if opt is not None and opt.reset_momenta:
            lines.append("  momenta are reset after each average of params")
        if way := self.route.describe():
            lines.append(f"  {way}")
        if not any(group.numel for group in self.groups):
            return lines[0] + "\n  nothing averages: all parameters are frozen"
        moved = dict.fromkeys(self._vectors_per_step(at) for at in (longest, shortest))  # one number, or from and to
        lines.append(
            f"  {' to '.join(f'{each:.4g}' for each in moved)} parameter vectors per step between replicas: "
            f"{' to '.join(f'{1 / each:.1f}' for each in reversed(moved))} times fewer than synchronous training"
        )
        if deslo.fragments > 1:
            lines.append(f"  at most {self.peak_bytes:,} bytes from each rank are under way at once, in fragments")
        memory = f"  memory: up to {self.flight_bytes:,} bytes on each rank while averages fly"
        memory += f", and {self.host_bytes:,} of the host" * self.route.host
        measured = deslo.telemetry is not None and deslo.telemetry.pseudo_gradient
        lines.append(memory + ", and one more copy of the parameters for the pseudo-gradient" * measured)
        never = dict.fromkeys(state for group in self.groups for state, period in group.periods.items() if not period)
        left_out = [
            "gradients" + " after those steps" * bool(deslo.synchronous_steps),
            *never,
            *["buffers"][: not self.buffer_bytes],
        ]
        lines.append(f"  not averaged: {', '.join(left_out)}")
        return "\n".join(lines)

    def _in_few_bits(self) -> str:
        wire = self.config.deslo.wire
        difference, feedback = require(wire.difference), require(wire.feedback)
        averaged = dict.fromkeys(state for group in self.groups for state, period in group.periods.items() if period)
        said = [
            f"{state} as {wire.name_of(state)}"
            + ", as differences" * (state in difference)
            + ", what is lost with the next" * (state in feedback)
            for state in averaged
            if wire.format_of(state)
        ]
        return f"in few bits: {'; '.join(said)}; {self.kept_bytes:,} bytes on each rank are kept for it"


def _direction(optimizer: OptimizerConfig | None) -> str:
    if optimizer is None:
        return "a stock optimizer, its states by deslo.sync_every"
    momenta = " + ".join(f"{w:g} u({b:g})" for w, b in zip(optimizer.weights, optimizer.betas))
    rest = 1 - sum(optimizer.weights)
    direction = f"{optimizer.rule}, direction {momenta}" + (f" + {rest:.3g} g" if rest > 1e-9 else "")
    return direction + (f"; beside matrices {_direction(optimizer.beside)}" if optimizer.beside else "")


def make_plan(
    config: Config,
    numels: Sequence[int],
    periods: Sequence[Schedule],
    topology: Topology,
    *,
    divisor: int = 1,
    gradient_bytes: Sequence[int] | None = None,
    buffer_bytes: int = 0,
    others: Sequence[Mapping[str, int]] | None = None,
    cuts: Sequence[Sequence[Sequence[int]]] | None = None,
    route: Route | None = None,
) -> Plan:
    """A plan for param groups of ``numels`` elements on this rank; ``divisor`` ranks split each average between them.

    Args:
        gradient_bytes: what a step of the warm-up sends for each group, by default as much as an average of one state.
        others: for each group, the elements of those states that are not of the parameters' sizes.
        cuts: for each group, of each fragment the elements of its parts on this rank; by default equal ones in one
            part.
        route: the way of averages, by default what the config says.
    """

    cost = WireCost(config.deslo, topology.replicas, divisor)
    spread = BYTES["float64"]  # travels with states whose periods adapt

    def parts(index: int, state: str) -> Sequence[Sequence[int]]:
        """Elements of the parts of each fragment of a state of group ``index``."""
        numel = (others[index] if others else {}).get(state, numels[index])
        return cuts[index] if cuts and numel == numels[index] else [[n] for n in sizes(numel, config.deslo.fragments)]

    groups = tuple(
        GroupPlan(
            numel=numel,
            fragment_bytes={
                state: tuple(cost.sent(state, each) + spread * (state in adaptive(own)) for each in parts(index, state))
                for state in own
            },
            fragment_memory={state: tuple(cost.memory(state, each) for each in parts(index, state)) for state in own},
            gradient_bytes=gradient_bytes[index] if gradient_bytes else cost.plain(numel),
            periods=own,
        )
        for index, (numel, own) in enumerate(zip(numels, periods, strict=True))
    )
    buffer_bytes += cost.weight if buffer_bytes else 0
    return Plan(config, topology, groups, buffer_bytes, divisor, route or Route(config.deslo.transport == "host"))
