"""State dicts that DesLoc takes over: its own, and a plain Adam(W)'s."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import ORIGIN, OUTER_MOMENTUM, OUTER_PARAMS, STEP, is_of_wire, period_key
from deslo_plugin.errors import ConfigError


def in_own_form(desloc: Any, state_dict: Mapping[str, Any]) -> tuple[dict[Tensor, dict[str, Tensor]], int]:
    """Parameter of ``desloc`` -> the states that ``state_dict`` has of it, in full, and the furthest step of all."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in desloc.param_groups)
    states = {
        param: {name: torch.as_tensor(value) for name, value in state.items() if value is not None}
        for index, param in zip(saved, params)
        if (state := state_dict["state"].get(index))
    }
    clock = max((int(state.get(STEP, 0)) for state in states.values()), default=0)
    optimizer = desloc.config.optimizer
    wanted = [*optimizer.moments, *((OUTER_PARAMS, OUTER_MOMENTUM) if optimizer.outer_optimizer else ())]
    for param, state in states.items():
        if ORIGIN not in state and STEP in state:  # Adam's own count of updates
            state[ORIGIN], state[STEP] = clock - state[STEP].float(), torch.tensor(float(clock))
        for counter in desloc.counters:
            if counter not in (STEP, ORIGIN):
                state.setdefault(counter, torch.zeros(()))
        names = sorted(name for name in state if not _is_beside(name))
        shapes = [tuple(state[name].shape) for name in names]
        if STEP not in state or names != sorted(wanted) or any(shape != tuple(param.shape) for shape in shapes):
            got = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes))
            raise ConfigError(
                "DesLoc.load_state_dict",
                f"step and {', '.join(wanted)} of shape {list(param.shape)}",
                got or "none of them",
                "load the states of an optimizer with these momenta and param groups in this order, or begin "
                "with fresh ones",
            )
    return states, clock


def _is_beside(name: str) -> bool:
    """Whether an optimizer may have this state or not."""
    return name in (STEP, ORIGIN) or name.endswith(period_key("")) or is_of_wire(name)
