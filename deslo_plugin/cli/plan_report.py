"""What ``deslo plan`` answers: the same figures as tables and as JSON, with all that they assume."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from rich.table import Table

from deslo_plugin.algorithm.adaptive_periods import Adaptive, adaptive, shortest
from deslo_plugin.algorithm.schedule import half_life
from deslo_plugin.cli.output import bytes_of, number, table
from deslo_plugin.planning.advice import Reach, hiding_delay, hiding_fragments, reach
from deslo_plugin.planning.alternatives import FEW_BITS, half_life_rule, papers_default, periods_of
from deslo_plugin.planning.comparison import IN_TURN, OWN, SYNCHRONOUS, Job, Method, methods
from deslo_plugin.planning.forecast import BACKWARD, Forecast, Link, memory

SWEEP = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 400.0, 1000.0)  # Gbit/s


class PlanReport:
    """``why`` says where the step's time ("step") and the gradients' dtype ("gradients") come from, ``left_out`` what
    of the config was "auto", ``target`` which share of its time a replica should compute, if that is asked."""

    def __init__(
        self,
        job: Job,
        link: Link,
        name: str,
        why: Mapping[str, str],
        left_out: Sequence[str] = (),
        target: float | None = None,
    ):
        self.job, self.link, self.name, self.why, self.left_out = job, link, name, why, left_out
        self.target = target
        self.methods = methods(job)

    @cached_property
    def forecasts(self) -> dict[str, tuple[Method, Forecast]]:
        return {method.name: (method, method.on(self.link)) for method in self.methods}

    def hours(self, gbit_per_s: float) -> dict[str, float]:
        """Method -> hours, had the link that bandwidth."""
        link = Link(gbit_per_s, self.link.latency_s)
        return {method.name: method.on(link).hours for method in self.methods}

    @property
    def host_bytes(self) -> int:
        """Host memory that averages pin on each rank; 0 if they go from device to device."""
        return self.forecasts[OWN][0].plan.host_bytes

    def as_dict(self) -> dict[str, Any]:
        own, job = self.forecasts[OWN][0], self.job
        return {
            "config": self.name,
            "parameters": job.numel,
            "replicas": job.replicas,
            "replica_size": job.replica_size,
            "steps": job.steps,
            "step_ms": job.step_s * 1e3,
            "gradient_dtype": job.gradient_dtype,
            "link": {"gbit_per_s": self.link.gbit_per_s, "latency_ms": self.link.latency_s * 1e3},
            "switch": self._switch,
            "states": self._states(),
            "methods": [self._row(method, seen) for method, seen in self.forecasts.values()],
            "memory_bytes_per_rank": vars(memory(own.plan, own.moved)),
            "pinned_host_bytes_per_rank": self.host_bytes,
            "hiding_delay": hiding_delay(job, self.link),
            "hiding_fragments": hiding_fragments(job, self.link),
            "target": self._target(),
            "sweep": [{"gbit_per_s": each, "hours": self.hours(each)} for each in SWEEP],
            "assumptions": self.assumptions,
        }

    def shown(self) -> list[Any]:
        """Tables and lines for people."""
        content = self.as_dict()
        job, link, needs = self.job, self.link, content["memory_bytes_per_rank"]
        return [
            f"{self.name}: {job.numel:,} parameters, {job.replicas} replicas of {job.replica_size} rank(s), "
            f"{link.gbit_per_s:g} Gbit/s and {link.latency_s * 1e3:g} ms between them, steps of "
            f"{job.step_s * 1e3:.4g} ms\n",
            *([f"Switch {switch}; half-lives are those after it\n"] if (switch := job.config.switch) else []),
            _states_table(content["states"], job.steps),
            "",
            _methods_table(content["methods"], job.steps),
            "",
            _sweep_table(content["sweep"]),
            "",
            f"Memory on each rank: {bytes_of(needs['states'])} of optimizer states, and at most "
            f"{bytes_of(needs['in_flight'])} of copies in flight, beside parameters, gradients and activations."
            + f" Averages through host memory pin up to {bytes_of(self.host_bytes)} there."
            * bool(self.host_bytes),
            self._advice(content),
            *([_target_line(self.target, content["target"])] if self.target else []),
            "",
            "What this assumes:",
            *(f"- {each}" for each in content["assumptions"]),
        ]

    def _states(self) -> list[dict[str, Any]]:
        config, own = self.job.config, periods_of(self.job.config)
        plan, seen = self.forecasts[OWN][0].plan, self.forecasts[OWN][1]
        betas = {} if config.optimizer is None else config.optimizer.after_switch.beta_of
        sources = dict.fromkeys(own, "given") if config.optimizer is None else config.optimizer.period_sources
        rule, default = half_life_rule(config) or {}, papers_default(own)
        return [
            {
                "state": state,
                "period": own[state],
                "source": sources[state],
                "half_life": half_life(betas[state]) if state in betas else None,
                "half_life_rule": rule.get(state),
                "papers_default": default[state],
                "averages": seen.events.get(state, 0),
                "bytes_per_average_and_rank": plan.groups[0].bytes_per_event[state] if own[state] else 0,
                "bytes_per_rank": seen.bytes.get(state, 0),
            }
            for state in own
        ]

    @property
    def _switch(self) -> dict[str, Any] | None:
        switch = self.job.config.switch
        return None if switch is None else switch.as_dict()

    def _row(self, method: Method, seen: Forecast) -> dict[str, Any]:
        reference, sent = self.forecasts[SYNCHRONOUS][1], sum(seen.bytes.values())
        every_step = method.plan.config.deslo.synchronous_steps >= self.job.steps
        return {
            "method": method.name,
            "periods": None if every_step else dict(shortest(method.plan.groups[0].periods)),
            "bytes_per_rank": sent,
            "bytes_per_rank_by_state": dict(seen.bytes),
            "times_less_than_synchronous": sum(reference.bytes.values()) / sent if sent else None,
            "exposed_ms_per_step": seen.exposed_s / seen.steps * 1e3,
            "longest_wait_s": seen.longest_s,
            "utilisation": seen.utilisation,
            "hours": seen.hours,
            "times_faster_than_synchronous": reference.hours / seen.hours,
        }

    def _advice(self, content: Mapping[str, Any]) -> str:
        row, delay = content["methods"][0], content["hiding_delay"]
        share = row["exposed_ms_per_step"] / (self.job.step_s * 1e3)
        if delay == self.job.config.deslo.sync_delay:
            return "The averages travel entirely under computation: nothing is waited for."
        text = f"Waiting adds {share:.1%} to the time of computing, at most {row['longest_wait_s']:.3g} s at once."
        parts = content["hiding_fragments"]
        if parts is not None:
            text += f' "fragments": {parts} would hide it all: as many bytes, as often, in parts at steps of their own.'
        if delay is not None:
            text += f' "sync_delay": {delay} would too' if parts else f' "sync_delay": {delay} would hide it all'
            return text + "; the gradients of those steps would not know the average yet."
        return text + " Longer periods wait less often; a faster link, or fewer bytes, less each time." * (not parts)

    def _target(self) -> dict[str, Any] | None:
        """Periods and fragments that reach ``target``; None if none do, or none is asked."""
        found = self.target and reach(self.job, self.link, self.target)
        if not isinstance(found, Reach):
            return None
        periods = periods_of(self.job.config)
        longer = {state: period and period * found.stretch for state, period in periods.items()}
        said = {"periods": longer, "fragments": found.fragments, "utilisation": found.utilisation}
        return said | {"wire_dtype": FEW_BITS if found.few_bits else self.job.config.deslo.wire.of_all}

    @property
    def _wire(self) -> str:
        wire = self.job.config.deslo.wire
        return wire.of_all if wire.of is None else ", ".join(f"{state} {name}" for state, name in wire.of.items())

    @property
    def _adaptive(self) -> Mapping[str, Adaptive]:
        return adaptive(self.forecasts[OWN][0].plan.groups[0].periods)

    @property
    def assumptions(self) -> list[str]:
        job, deslo = self.job, self.job.config.deslo
        hides = (
            f"{deslo.sync_delay} step(s) of computing hide an average"
            if deslo.overlap_comm
            else "averages are not overlapped"
        )
        return [
            f"a ring all-reduce of b bytes takes 2 b/B (1 - 1/M) + l, M = {job.replicas} (arXiv 2505.22549); l once "
            f"for every {deslo.bucket_cap_mb} MiB begun, and where averages overlap once more for the word that they "
            "may land; all replicas alike, nobody else on the link",
            f"B = {self.link.gbit_per_s:g} Gbit/s of payload in each direction, shared by the {job.replica_size} "
            "rank(s) of a replica; headers and protocol are not counted: what deslo probe measures has them taken off",
            f"a rank holds and sends 1/{job.replica_size} of the parameters (ZeRO 1 to 3, FSDP2; DDP and ZeRO 0 send "
            "as much, but hold all states on every rank); that shards differ by padding is not counted",
            f"averages travel in {self._wire}; gradients of synchronous training in {job.gradient_dtype} "
            f"({self.why['gradients']}), reduced inside a replica first",
            f"a step computes for {job.step_s * 1e3:.4g} ms ({self.why['step']}), with and without communication "
            f"beside it",
            f"{hides}; states due at one step travel one after the other; the optimizer's own time counts as computing",
            f"synchronous training waits for every gradient (the papers' model), or hides it under {BACKWARD:.0%} of "
            "a step (what bucketing can reach at best)",
            *(
                f"{state} is {bounds}: at its shortest here, the most that it may send"
                for state, bounds in self._adaptive.items()
            ),
            *(f'{each} has its default, since the config leaves it to the job ("auto")' for each in self.left_out),
            "all parameters have the config's periods: param groups with their own are the script's",
            "not counted: the model's floating buffers, reductions inside a replica, data loading, evaluation, "
            "checkpoints, stragglers, failures",
            f"bytes are those of averages that have landed when step {job.steps:,} ends, as a rank's meter counts them",
        ]


def _target_line(target: float, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"No periods, fragments and formats that were tried reach {target:.4g} of the time for computing here."
    every = ", ".join(f"{state} {period or 'never'}" for state, period in found["periods"].items())
    few = f' and "wire_dtype": "{FEW_BITS}"' if found["wire_dtype"] == FEW_BITS else ""
    return (
        f'To compute for {target:.1%} of the time: periods of {every}, with "fragments": {found["fragments"]}{few} '
        f"({found['utilisation']:.1%}). What it costs in loss: of periods docs/results.md, of few bits docs/wire.md."
    )


def _states_table(states: list[Mapping[str, Any]], steps: int) -> Table:
    def text(value: Any, form: str = ",") -> str:
        return "-" if value is None else format(value, form)

    columns = (
        "state",
        "period",
        "why",
        "half-life",
        "half-life rule",
        "3x / 6x",
        "averages",
        "each, of a rank",
        "in all",
    )
    return table(
        f"Periods, and averages in {steps:,} steps",
        columns,
        [
            (
                each["state"],
                text(each["period"]) if each["period"] else "never",
                each["source"],
                text(each["half_life"], ".1f"),
                text(each["half_life_rule"]),
                text(each["papers_default"]),
                text(each["averages"]),
                bytes_of(each["bytes_per_average_and_rank"]),
                bytes_of(each["bytes_per_rank"]),
            )
            for each in states
        ],
    )


def _methods_table(rows: list[Mapping[str, Any]], steps: int) -> Table:
    columns = (
        "method",
        "bytes of a rank",
        "times less",
        "waited ms/step",
        "at once, s",
        "computing",
        "hours",
        "times faster",
    )
    return table(
        f"{steps:,} steps beside synchronous training, at equal steps, not at equal loss",
        columns,
        [
            (
                each["method"],
                bytes_of(each["bytes_per_rank"]),
                f"{each['times_less_than_synchronous']:.1f}" if each["times_less_than_synchronous"] else "-",
                f"{each['exposed_ms_per_step']:.4g}",
                f"{each['longest_wait_s']:.3g}",
                f"{each['utilisation']:.1%}",
                number(each["hours"]),
                f"{each['times_faster_than_synchronous']:.2f}",
            )
            for each in rows
        ],
    )


def _sweep_table(sweep: list[Mapping[str, Any]]) -> Table:
    names = [name for name in sweep[0]["hours"] if name != IN_TURN]
    return table(
        "Hours, had the link",
        ("Gbit/s", *names),
        [(f"{each['gbit_per_s']:g}", *(number(each["hours"][name]) for name in names)) for each in sweep],
    )
