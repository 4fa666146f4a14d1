"""State dicts that DesLoc takes over: its own, and a plain Adam(W)'s."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.algorithm.state_names import ORIGIN, OUTER_MOMENTUM, OUTER_PARAMS, STEP, is_of_wire, period_key
from deslo_plugin.algorithm.switch import saved as saved_switch
from deslo_plugin.config.schema import OptimizerConfig
from deslo_plugin.config.switch import refuse_other_switch
from deslo_plugin.errors import ConfigError


def in_own_form(desloc: Any, state_dict: Mapping[str, Any]) -> tuple[dict[Tensor, dict[str, Tensor]], int]:
    """Parameter of ``desloc`` -> the states that ``state_dict`` has of it, in full, and the furthest step of all.

    Raises ``ConfigError`` for what cannot be taken over."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    rules = {param: desloc.rule_of(group) for group in desloc.param_groups for param in group["params"]}
    states = {
        param: {name: torch.as_tensor(value) for name, value in state.items() if value is not None}
        for index, param in zip(saved, rules)
        if (state := state_dict["state"].get(index))
    }
    clock = max((int(state.get(STEP, 0)) for state in states.values()), default=0)
    for group, own in zip(state_dict["param_groups"], desloc.param_groups):
        now = desloc.rule_of(own).switch
        refuse_other_switch("DesLoc.load_state_dict", saved_switch(group.get("switch")), now, clock)
    for param, state in states.items():
        optimizer = rules[param]
        wanted = [*optimizer.moments, *((OUTER_PARAMS, OUTER_MOMENTUM) if optimizer.outer_optimizer else ())]
        awaited = awaited_momenta(optimizer, clock)
        if ORIGIN not in state and STEP in state:  # Adam's own count of updates
            state[ORIGIN], state[STEP] = clock - state[STEP].float(), torch.tensor(float(clock))
            refuse_adams_momenta("DesLoc.load_state_dict", optimizer, clock)
        for counter in desloc.counters:
            if counter not in (STEP, ORIGIN):
                state.setdefault(counter, torch.zeros(()))
        names = sorted(name for name in state if not _is_beside(name))
        shapes = [tuple(state[name].shape) for name in names]
        if (
            STEP not in state
            or names != sorted({*wanted} - ({*awaited} - {*names}))
            or any(shape != tuple(param.shape) for shape in shapes)
        ):
            got = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes))
            raise ConfigError(
                "DesLoc.load_state_dict",
                f"step and {', '.join(wanted)} of shape {list(param.shape)}",
                got or "none of them",
                "load the states of an optimizer with these momenta and param groups in this order, or begin "
                "with fresh ones",
            )
        state |= {name: torch.zeros(param.shape) for name in awaited if name not in state}
    return states, clock


def _is_beside(name: str) -> bool:
    """Whether an optimizer may have this state or not."""
    return name in (STEP, ORIGIN) or name.endswith(period_key("")) or is_of_wire(name)


def awaited_momenta(optimizer: OptimizerConfig, clock: int) -> list[str]:
    """Momenta that count for nothing before the switch, which lies ahead and resets them: Adam need not have them."""
    if optimizer.switch is None or clock > optimizer.switch.at:
        return []
    weighed = zip(optimizer.momenta, optimizer.weights)
    return [name for name, weight in weighed if not weight and name in optimizer.switch.reset]


def refuse_adams_momenta(where: str, optimizer: OptimizerConfig, clock: int) -> None:
    """Raises ``ConfigError`` for a rule whose momenta are of gradients that were divided already, unless the next step
    resets them."""
    switch, rule = optimizer.switch, RULES[optimizer.rule]
    resets = switch.reset if switch is not None and switch.at == clock else ()
    if rule.has_second_moment and not rule.bounds_momenta and set(optimizer.momenta) - set(resets):
        raise ConfigError(
            where,
            f"states of {rule.title}, whose momenta are of gradients that its second moment has divided, or of Adam "
            f"with a switch that resets all first momenta at its step, {clock}",
            "Adam's",
            'take "rule": "adam", or set optimizer.params.switch.at to that step',
        )
