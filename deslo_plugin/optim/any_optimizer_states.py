"""What a stock optimizer keeps of each parameter: states that have a mean, and counters, told apart by their names and
shapes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import PARAMS, STEP
from deslo_plugin.config.reader import did_you_mean
from deslo_plugin.errors import ConfigError


def counted_in(states: Mapping[Tensor, Mapping[str, Any]]) -> set[str]:
    """Names of 0-dim states that are counters: those of parameters with dimensions, and ``step``."""
    return {STEP} | {
        name
        for param, state in states.items()
        if param.ndim
        for name, value in state.items()
        if isinstance(value, Tensor) and not value.ndim
    }


def kinds_of(params: list[Tensor], states: Mapping[Tensor, Mapping[str, Any]], counters: set[str]) -> dict[str, str]:
    """State name -> dtype, of the states that any of ``params`` has and that are no counters."""
    return {
        name: str(value.dtype).removeprefix("torch.")
        for param in params
        for name, value in states.get(param, {}).items()
        if isinstance(value, Tensor) and (value.ndim > 0 or (param.ndim == 0 and name not in counters))
    }


def counts(value: Any) -> bool:
    """Whether a value of a parameter's state is a number or has no dimensions."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def told(counters: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Name -> value and dtype of each counter, as plain data; no dtype for a number."""
    return {
        name: (value.item(), str(value.dtype).removeprefix("torch.")) if isinstance(value, Tensor) else (value, "")
        for name, value in counters.items()
    }


def counter(value: float, dtype: str) -> Any:
    return torch.tensor(value, dtype=getattr(torch, dtype)) if dtype else value


def updates_of(state: Mapping[str, Any]) -> int:
    """How often a parameter was updated, where its state counts that."""
    return int(state.get("step", 0))


def check_state_periods(periods: Mapping[str, int | None], kinds: Mapping[str, str], optimizer: str) -> None:
    where, names = "deslo.sync_every", ", ".join(sorted(kinds)) or "none"
    for name in periods:
        if name != PARAMS and name not in kinds:
            raise ConfigError(
                f"{where}.{name}",
                f"{PARAMS} or a state of {optimizer} ({names})",
                "an unknown one",
                did_you_mean(name, kinds) or "remove it",
            )
    for name, kind in sorted(kinds.items()):
        if name not in periods:
            raise ConfigError(
                where,
                f"a period for every state of {optimizer} ({names})",
                f"none for {name}",
                f'add "{name}": a number of steps, or null for never',
            )
        if periods[name] and not getattr(torch, kind).is_floating_point:
            raise ConfigError(
                f"{where}.{name}",
                f"null: {kind} values of {optimizer} have no mean",
                str(periods[name]),
                "write null, or take an optimizer with floating states",
            )


def refuse_inner_loops(optimizer: torch.optim.Optimizer) -> None:
    """Raises ``ConfigError`` for an optimizer whose ``step()`` is not the update of every parameter: averages need
    that."""
    kind = type(optimizer).__name__
    if wrapped := _wrapped(optimizer):
        one = "the inner one" if len(wrapped) == 1 else "each of the inner ones with its own sync_every"
        calls = ", ".join(f"attach(model, {each}, ...)" for each in wrapped)
        raise ConfigError(
            "attach(optimizer)",
            "the optimizer that updates the parameters",
            f"{kind}, which wraps {' and '.join(dict.fromkeys(type(each).__name__ for each in wrapped.values()))}",
            f"attach {one}: {calls}, and go on calling {kind} as before",
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "attach(optimizer)",
            "states that each belong to one parameter",
            f"{kind}, which keeps one history of all",
            "take an optimizer whose states have a mean, such as AdamW or SGD",
        )
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        raise ConfigError(
            "attach(optimizer)",
            "an optimizer whose step() is the update",
            f"{kind}, which steps by first_step and second_step",
            "give it a base optimizer that makes the update, and attach that one",
        )


def _wrapped(optimizer: torch.optim.Optimizer) -> dict[str, torch.optim.Optimizer]:
    """The optimizers that this one holds, alone or in a list or dict, by what a script calls them."""
    held: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        if isinstance(value, (list, tuple)):
            held |= {f"optimizer.{name}[{index}]": each for index, each in enumerate(value)}
        elif isinstance(value, dict) and name != "state":
            held |= {f"optimizer.{name}[{key!r}]": each for key, each in value.items()}
        else:
            held[f"optimizer.{name}"] = value
    return {name: each for name, each in held.items() if isinstance(each, torch.optim.Optimizer)}
