"""What becomes of a run's averages and losses: lines of a journal, scalars of whoever draws curves, and a summary.

Nothing here waits for a disk, and nothing but scalars for the user's own trackers: one call for each step with an
average."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.adaptive_periods import written
from deslo_plugin.algorithm.switch import Switch
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.comm.topology import Topology
from deslo_plugin.config.load import as_dict
from deslo_plugin.config.reader import plain, repr_with_type
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.log import log_rank0
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.planning.plan import Plan
from deslo_plugin.telemetry.jsonl_writer import JsonlWriter
from deslo_plugin.version import __version__

Sink = Callable[[Mapping[str, float], int], object]
"""Takes scalars by ``group/name``, and the completed steps that they are of."""


class Recorder:
    """Writes down what ``averaging`` does once ``start`` was called, and passes scalars on to those that were added."""

    def __init__(self, averaging: StateAverager):
        self.averaging = averaging
        self.journal: JsonlWriter | None = None
        self._sinks: list[Sink] = []
        self.closing: list[Callable[[], object]] = []  # writers of the user's own, told at the end that it is one
        self._pending: dict[str, float] = {}
        self._steps, self._began, self.ended = 0, time.time(), False

    def start(self, path: Path, plan: Plan) -> None:
        """Opens the journal. Raises ``OSError`` where it cannot be written."""
        self.journal = JsonlWriter(path)
        self.journal.write(
            {"kind": "start", "at": self._began, "version": __version__} | _place(plan.topology) | _planned(plan)
        )
        self.averaging.listeners.append(self._write)
        if isinstance(self.averaging.optimizer, DesLoc):
            self.averaging.optimizer.on_switch.append(self._write_switch)

    def add_sink(self, sink: Sink) -> None:
        """``sink`` gets the scalars of every step with an average, once ``step_ended`` says that there are no more, or
        the next average does. One that raises is said once and dropped."""
        if not self._sinks:
            self.averaging.listeners.append(self._collect)
        self._sinks.append(sink)

    def log(self, values: Mapping[str, Any]) -> None:
        """Writes numbers of the user's own. Raises ``ConfigError`` for what is no number."""
        if self.journal is None:
            return
        record = {"kind": "log", "at": time.time(), "steps": self.averaging.steps}
        for name, value in values.items():
            if name in record:
                raise ConfigError(f"log({name}=...)", "another name", "one that every line has", "rename it")
            record[name] = _number(name, value)
        self.journal.write(record)

    def step_ended(self) -> None:
        """Hands the scalars of the step over."""
        if not self._pending:
            return
        scalars, self._pending = self._pending, {}
        for sink in list(self._sinks):
            try:
                sink(scalars, self._steps)
            except Exception as error:  # a tracker's trouble must not end the training
                self._sinks.remove(sink)
                log_rank0(f"deslo: no more scalars from here on, {error!r}", logging.WARNING, anywhere=True)

    def end(self, plan: Plan) -> None:
        """Writes totals and all that is waiting. Nothing is written after it."""
        self.ended = True
        self.step_ended()
        for close in self.closing:
            try:
                close()
            except Exception as error:  # a full disk, say: the journal and the job go on to their end
                log_rank0(f"deslo: scalars may be lost, {error!r}", logging.WARNING, anywhere=True)
        if self.journal is None:
            return
        meter = self.averaging.stats
        self.journal.write(
            {
                "kind": "end",
                "at": time.time(),
                "steps": self.averaging.steps,
                "taken": meter.steps,
                "bytes": dict(meter.bytes),
                "events": dict(meter.events),
                "exposed_s": meter.seconds_exposed,
                "skipped_steps": meter.skipped_steps,
                "refused_averages": meter.refused_averages,
                "failed_checks": meter.failed_checks,
                "reduction": reduction(self.averaging, plan),
            }
        )
        self.averaging.listeners.remove(self._write)
        self.journal.close()
        self.journal = None

    def summary(self, plan: Plan) -> str:
        """What averaging has moved, cost and found since this process attached."""
        meter, passed = self.averaging.stats, time.time() - self._began
        less = reduction(self.averaging, plan)
        lines = [
            f"deslo: {meter.steps:,} steps, {sum(meter.bytes.values()):,} bytes from this rank"
            + (f", {less:.1f} times fewer than synchronous training" if less else "")
        ]
        for state, count in meter.bytes.items():
            drift = meter.drift.get(state)
            found = f"; last drift {drift.distance:.3g}, cosine {drift.cosine:.4f}" if drift else ""
            lines.append(f"  {state}: {meter.events[state]:,} times, {count:,} bytes{found}")
        share = 100 * meter.seconds_exposed / passed if passed else 0.0
        lines.append(f"  waited for averages: {meter.seconds_exposed:.2f} s of {passed:.1f} s ({share:.2g}%)")
        if meter.skipped_steps or meter.refused_averages:
            lines.append(
                f"  steps left out: {meter.skipped_steps}; averages that did not arrive: {meter.refused_averages}"
            )
        if meter.failed_checks:
            lines.append(f"  checks that failed: {meter.failed_checks}; attachment.check() says which")
        return "\n".join(lines)

    def _write(self, event: SyncEvent) -> None:
        require(self.journal).write(
            {
                "kind": "average",
                "at": time.time(),
                "steps": event.steps,
                "bytes": event.bytes,
                "in_flight_s": event.seconds_in_flight,
                "exposed_s": event.seconds_exposed,
                "distance": {state: drift.distance for state, drift in event.drift.items()},
                "cosine": {state: drift.cosine for state, drift in event.drift.items()},
            }
        )

    def _write_switch(self, switch: Switch) -> None:
        if self.journal is not None:
            record = {"kind": "switch", "at": time.time(), "steps": switch.at}
            self.journal.write(record | {name: value for name, value in switch.as_dict().items() if name != "at"})

    def _collect(self, event: SyncEvent) -> None:
        if event.steps != self._steps:
            self.step_ended()
        self._steps, scalars, meter = event.steps, self._pending, self.averaging.stats
        for state, drift in event.drift.items():  # of param groups, which land one by one, the worst
            far, near = f"deslo_distance/{state}", f"deslo_cosine/{state}"
            scalars[far], scalars[near] = (
                max(scalars.get(far, 0.0), drift.distance),
                min(scalars.get(near, 1.0), drift.cosine),
            )
        for state, seconds in event.seconds_in_flight.items():
            name = f"deslo_in_flight_s/{state}"
            scalars[name] = max(scalars.get(name, 0.0), seconds)
        for state in event.bytes:
            scalars[f"deslo_bytes/{state}"] = meter.bytes[state]
        scalars["deslo_exposed_s/all"] = meter.seconds_exposed


def reduction(averaging: StateAverager, plan: Plan) -> float | None:
    """Bytes of as many synchronous steps, over those that were sent; None while nothing was."""
    sent = sum(averaging.stats.bytes.values())
    return averaging.stats.steps * plan.synchronous_bytes / sent if sent else None


def _place(topology: Topology) -> dict[str, int]:
    return {name: getattr(topology, name) for name in ("replica", "shard", "replicas", "replica_size")}


def _planned(plan: Plan) -> dict[str, Any]:
    stock = plan.config.deslo.sync_every  # which states each group has is known after the first step
    return {
        "synchronous_bytes": plan.synchronous_bytes,
        "groups": [{"periods": written(stock or group.periods), "numel": group.numel} for group in plan.groups],
        "config": as_dict(plan.config),
    }


def _number(name: str, value: Any) -> float | Callable[[], float]:
    """A number as it is now. One on a GPU stays there until the writer reads it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return _on_gpu(value.detach()) if value.is_cuda else value.item()
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"log({name}=...)", "a number, or a tensor with one", repr_with_type(value), "log what it comes to"
        )
    return value


def _on_gpu(value: Tensor) -> Callable[[], float]:
    """Reads a copy on the host, from whatever thread, once it is there: the stream that it is made on is known only
    now. The reader sends nothing to the GPU, where a graph may be captured meanwhile."""
    copy, made = torch.empty_like(value, device="cpu", pin_memory=True), torch.cuda.Event()
    copy.copy_(value, non_blocking=True)
    made.record(torch.cuda.current_stream(value.device))

    def read() -> float:
        made.synchronize()
        return copy.item()

    return read
