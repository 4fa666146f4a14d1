"""Any optimizer's own states on periods of their own: torch's AdamW, Lion, Muon, whatever keeps tensors in ``state[p]``."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.averaging import Averaging, Group
from deslo_plugin.clock import GROUP_STEP, GroupClock
from deslo_plugin.collectives import Average
from deslo_plugin.config import DesloConfig
from deslo_plugin.names import PARAMS, STEP
from deslo_plugin.shards import local
from deslo_plugin.strict import ConfigError, near
from deslo_plugin.telemetry import SyncEvent

Everyone = Callable[[Any], list[Any]]
"""Everyone's value: collective over all ranks of all replicas."""


class StockAveraging(Averaging):
    """Averages the parameters and states of ``optimizer`` by ``deslo.sync_every``, keyed by torch's state names.

    Which states there are is known when the first step has created them. Then every tensor with dimensions that a
    parameter's state holds must be in ``sync_every``, with a period or null; counters (numbers and 0-dim tensors) need no
    average, as all replicas count alike. Of a parameter without dimensions all states are 0-dim: what others count in is a
    counter there too, and ``step``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        deslo: DesloConfig,
        average: Average,
        *,
        groups: Sequence[Group] | None = None,
        everyone: Everyone = lambda value: [value],
        emit: Callable[[SyncEvent], object] | None = None,
    ):
        super().__init__(optimizer, deslo, average, GroupClock(), groups=groups, emit=emit)
        self._everyone, self.periods_known = everyone, False
        for group in self.groups:
            group["sync_every"] = {PARAMS: deslo.sync_every[PARAMS]}

    def learn_states(self, updated: bool) -> None:
        """After an update: gives each param group the periods of the states that it turned out to have.

        Does nothing more once it knows them; ``updated`` is False on a replica that left this update out. Raises
        ``ConfigError`` for a name that no state has, a state that no name covers, and a period for a state that has no
        mean (whole numbers, quantised blocks). Collective; all ranks decide alike.
        """
        if self.periods_known:
            return
        counters = counted_in(self.optimizer.state)
        mine = [_kinds(group["params"], self.optimizer.state, counters) for group in self.groups]
        updates, *everyone = zip(*self._everyone((updated, *mine)))
        if not any(updates):
            return
        kinds = [{name: kind for each in of_group for name, kind in each.items()} for of_group in everyone]
        known = {name: kind for of_group in kinds for name, kind in of_group.items()}
        _check(self.deslo.sync_every, known, type(self.optimizer).__name__)
        for group, of_group in zip(self.groups, kinds):
            group["sync_every"] |= {name: self.deslo.sync_every[name] for name in sorted(of_group)}
        self.periods_known = True

    def state_numels(self, group: Group) -> dict[str, int]:
        """State -> elements that average on this rank: not all have the sizes of the parameters."""
        averaged = {name: [self.optimizer.state[param].get(name, param) for param in self.members.of(group)]
                    for name in group["sync_every"] if name != PARAMS}
        return {name: sum(value.numel() for value in local(values)) for name, values in averaged.items()}

    def resume(self, steps: int) -> None:
        """Goes on after ``steps`` completed steps, with states that a checkpoint has brought: some may be due at once."""
        for group in self.groups:
            group[GROUP_STEP] = steps
        self.learn_states(steps > 0)

    def skip_step(self) -> None:
        """A step without an update, which every other replica may be taking: the clock ticks and averages land."""
        self.around(lambda cohorts: self.learn_states(updated=False))


def schedule(averaging: StockAveraging) -> None:
    """From now on every ``optimizer.step()`` is a step of Algorithm 1. Wraps the instance's ``step``."""
    optimizer = averaging.optimizer
    inner, scales = optimizer.step, getattr(optimizer, "_step_supports_amp_scaling", False)

    def update(cohorts: Any) -> None:
        broken = averaging.broken()
        if not broken:
            with contextlib.nullcontext() if scales else _unscaled(averaging):
                inner()
        averaging.learn_states(not broken)

    @functools.wraps(inner)
    @torch.no_grad()
    def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        averaging.around(update)
        return loss

    optimizer.step = MethodType(step, optimizer)  # a method still: torch's lr schedulers ask for its __func__
    optimizer._step_supports_amp_scaling = True  # GradScaler: call ``step`` always, so that every replica's clock ticks


@contextlib.contextmanager
def _unscaled(averaging: StockAveraging) -> Iterator[None]:
    """What a GradScaler has left on an optimizer that knows nothing of it, out of its sight; gradients divided by the scale."""
    left = {name: vars(averaging.optimizer).pop(name) for name in ("grad_scale", "found_inf") if hasattr(averaging.optimizer, name)}
    if left.get("grad_scale") is not None:
        torch._foreach_div_(averaging.gradients(), left["grad_scale"])
    try:
        yield
    finally:
        vars(averaging.optimizer).update(left)


def counted_in(states: Mapping[Tensor, Mapping[str, Any]]) -> set[str]:
    """Names of 0-dim states that are counters: those of parameters with dimensions, and ``step``."""
    return {STEP} | {name for param, state in states.items() if param.ndim
                     for name, value in state.items() if isinstance(value, Tensor) and not value.ndim}


def _kinds(params: list[Tensor], states: Mapping[Tensor, Mapping[str, Any]], counters: set[str]) -> dict[str, str]:
    """State name -> dtype, of the states that any of ``params`` has and that are no counters."""
    return {
        name: str(value.dtype).removeprefix("torch.")
        for param in params
        for name, value in states.get(param, {}).items()
        if isinstance(value, Tensor) and (value.ndim > 0 or param.ndim == 0 and name not in counters)
    }


def _check(periods: Mapping[str, int | None], kinds: Mapping[str, str], optimizer: str) -> None:
    where, names = "deslo.sync_every", ", ".join(sorted(kinds)) or "none"
    for name in periods:
        if name != PARAMS and name not in kinds:
            raise ConfigError(f"{where}.{name}", f"{PARAMS} or a state of {optimizer} ({names})", "an unknown one",
                              near(name, kinds) or "remove it")
    for name, kind in sorted(kinds.items()):
        if name not in periods:
            raise ConfigError(where, f"a period for every state of {optimizer} ({names})", f"none for {name}",
                              f'add "{name}": a number of steps, or null for never')
        if periods[name] and not getattr(torch, kind).is_floating_point:
            raise ConfigError(f"{where}.{name}", f"null: {kind} values of {optimizer} have no mean", str(periods[name]),
                              "write null, or take an optimizer with floating states")
