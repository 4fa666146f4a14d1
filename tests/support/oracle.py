"""M replicas in one process, in float64, from the papers alone: what every implementation is held against.

Imports nothing of the package. A model is a list of param groups, one flat vector each; gradients come from a function
of (replica, step, vectors). Equation numbers: DES-LOC, arXiv 2505.22549; MT-DAO, arXiv 2510.05361.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.support.oracle_config import Switch
from tests.support.oracle_config import blocks as blocks
from tests.support.oracle_config import states as states

Gradient = Callable[[int, int, list[Tensor]], list[Tensor] | None]
# of a state over replicas, by what they saw up to a step
Mean = Callable[[str, int, Callable[["Group"], Tensor]], Tensor]


@dataclass
class Setting:
    """One param group's algorithm. ``periods`` has keys "x", "u1", "u2", ..., "v"; None = never."""

    rule: str
    periods: dict[str, int | None]
    betas: list[float]
    weights: list[float]
    beta2: float = 0.95
    eps: float = 1e-8
    lr: float = 1e-2
    weight_decay: float = 0.0
    bias_correction: bool = True
    value_clip: float | None = None
    after_update: bool = False
    reset: bool = False
    outer: tuple[float, float] | None = None  # (outer lr, momentum)
    # "u1" -> (longest period, drift); ``periods``: shortest
    adaptive: dict[str, tuple[int, float]] = field(default_factory=dict)
    # key -> at which steps of its period each of its fragments, equal parts of the vector in order, is averaged
    offsets: dict[str, list[int]] = field(default_factory=dict)
    places: Tensor | None = None  # the fragment of each element, where they are not equal parts in order
    delay: int = 1  # steps from the launch of an average to the one at whose start it lands, counting that one
    switch: Switch | None = None
    # betas before the switch of momenta that went through it, beside ``betas``
    kept: list[float] | None = None


@dataclass
class Group:
    """One replica's share of one param group. ``updates`` counts the rule's own steps since the start or a reset."""

    x: Tensor
    u: list[Tensor]
    v: Tensor
    anchor: Tensor
    momentum: Tensor
    updates: int = 0
    launched: "list[Launched]" = field(default_factory=list)


@dataclass
class Launched:
    """One state when step ``t`` began: of one replica, and the mean over all. ``updates`` were made of it before."""

    key: str
    t: int
    updates: int
    own: Tensor
    mean: Tensor
    due: Tensor  # which elements of it


def train(
    settings: list[Setting],
    starts: list[Tensor],
    replicas: int,
    steps: int,
    gradient: Gradient,
    norm_clip: float | None = None,
    synchronous_steps: int = 0,
    samples: Callable[[int, int], float] | None = None,
) -> list[list[Group]]:
    """Runs Algorithm 1; returns world[replica][group]. A gradient of None is a step that this replica skips.

    ``samples(replica, step)`` is what a replica sees in a step: a state averaged every K steps weighs it by the last K.
    In the first ``synchronous_steps`` all replicas step by their mean gradient, and there is nothing to average.
    """
    settings = [replace(s, periods=dict(s.periods)) for s in settings]
    shortest = [dict(s.periods) for s in settings]
    world = [[_start(s, x.double()) for s, x in zip(settings, starts)] for _ in range(replicas)]
    for t in range(steps):
        # gradients are taken at the parameters as they are before the average of this step
        gradients = [gradient(m, t, [group.x for group in groups]) for m, groups in enumerate(world)]
        if t < synchronous_steps:
            mean = [torch.stack(parts).mean(0) for parts in zip(*gradients)]
            gradients = [mean for _ in gradients]
        for index, s in enumerate(settings):
            column = [groups[index] for groups in world]
            averages = t > synchronous_steps

            def mean(
                key: str, now: int, of: Callable[[Group], Tensor], groups: list[Group] = column, s: Setting = s
            ) -> Tensor:
                since = range(max(0, now - s.periods[key]), now)
                seen = [sum(samples(m, i) for i in since) if samples else 1.0 for m in range(replicas)]
                return sum(w * of(group) for w, group in zip(seen, groups)) / sum(seen)

            now = t + 1 if s.after_update else t
            adapt = [key for key in s.adaptive if now > synchronous_steps and now % s.periods[key] == 0]
            if not s.after_update:
                found = {key: _drift([_state(group, key) for group in column]) for key in adapt}
            if s.delay > 1:
                if averages:
                    _launch(column, s, t, mean)
                for group in column:
                    _land(group, s, t)
            elif averages and not s.after_update:
                _average(column, s, t, mean)
            if s.switch and t == s.switch.at:
                _switch(column, s, s.switch)
            for group, g in zip(column, gradients):
                if g is not None:
                    _update(group, s, _clip([each.double() for each in g], norm_clip)[index])
                if t < synchronous_steps:
                    group.anchor = group.x.clone()  # the outer optimizer begins where the warm-up ends
            if s.after_update and t + 1 > synchronous_steps:
                found = {key: _drift([_state(group, key) for group in column]) for key in adapt}
                _average(column, s, t + 1, mean)
            for key in adapt:
                longest, drift = s.adaptive[key]
                if found[key] > drift:
                    s.periods[key] = max(s.periods[key] // 2, shortest[index][key])
                elif found[key] < drift / 2 and now % (2 * s.periods[key]) == 0:
                    s.periods[key] = min(s.periods[key] * 2, longest)
    return world


def _drift(each: list[Tensor]) -> float:
    """Root mean square distance from the mean over replicas, in lengths of that mean."""
    mean = torch.stack(each).mean(0)
    return float(torch.stack([(one - mean).square().sum() for one in each]).mean().sqrt() / mean.norm())


def _start(s: Setting, x: Tensor) -> Group:
    zeros = torch.zeros_like(x)
    return Group(x.clone(), [zeros.clone() for _ in s.betas], zeros.clone(), x.clone(), zeros.clone())


def _clip(g: list[Tensor], norm_clip: float | None) -> list[Tensor]:
    if norm_clip is None:
        return g
    norm = float(torch.cat([each.flatten() for each in g]).norm())
    return [each * min(1.0, norm_clip / (norm + 1e-6)) for each in g]


def _due(s: Setting, key: str, t: int, x: Tensor) -> Tensor:
    """Which elements of a state are averaged when step ``t`` begins."""
    due, period = torch.zeros(len(x), dtype=torch.bool), s.periods.get(key)
    offsets = s.offsets.get(key, [0])
    for i, offset in enumerate(offsets):
        if t > 0 and period and (t - offset) % period == 0:
            places = torch.arange(len(x)) * len(offsets) // len(x) if s.places is None else s.places
            due |= places == i
    return due


def _average(column: list[Group], s: Setting, t: int, mean: Mean) -> None:
    keys = [key for key in s.periods if key[0] != "u" or int(key[1:]) <= len(s.betas)]
    due = {key: where for key in keys if (where := _due(s, key, t, column[0].x)).any()}
    means = {key: mean(key, t, lambda group: _state(group, key)) for key in due}
    for group in column:
        for key in due.keys() - {"x"}:
            _set(group, key, torch.where(due[key], means[key], _state(group, key)))
        if "x" in due:
            _server(group, s, means["x"], due["x"])
            if s.reset:
                group.u = [torch.zeros_like(each) for each in group.u]
                group.v, group.updates = torch.zeros_like(group.v), 0
        _hold(group, s, due, t)


def _hold(group: Group, s: Setting, landed: dict[str, Tensor], t: int) -> None:
    """No momentum beyond what Adam could have beside its own v, by Cauchy-Schwarz, once either has landed after t steps
    (ours)."""
    for j, beta in enumerate(s.betas if s.rule == "adam" else []):
        where = [landed[key] for key in (f"u{j + 1}", "v") if key in landed]
        if where:
            most = torch.maximum(_most(beta, s, group.v, t), _most((s.kept or s.betas)[j], s, group.v, t))
            held = torch.minimum(torch.maximum(group.u[j], -most), most)
            group.u[j] = torch.where(torch.stack(where).any(0), held, group.u[j])


def _most(beta: float, s: Setting, v: Tensor, t: int) -> Tensor:
    ratio = beta * beta / s.beta2
    powers = 1 / (1 - ratio) if ratio < 1 else sum(ratio**i for i in range(t))
    return (1 - beta) * (v * powers / (1 - s.beta2)).sqrt()


def _switch(column: list[Group], s: Setting, to: Switch) -> None:
    """The update's numbers change; what flies of a momentum that is reset lands as nothing."""
    for group in column:
        for flight in group.launched:
            flight.own, flight.mean = torch.zeros_like(flight.own), _remaining(flight, group, s)
            flight.updates = group.updates
            if flight.key in [f"u{j}" for j in to.reset]:
                flight.mean = flight.own
        for j in to.reset:
            group.u[j - 1] = torch.zeros_like(group.u[j - 1])
    s.kept = [to.betas[j] if j + 1 in to.reset else beta for j, beta in enumerate(s.betas)]
    s.betas, s.weights, s.lr = to.betas, to.weights, s.lr * to.lr_factor


def _state(group: Group, key: str) -> Tensor:
    return group.u[int(key[1:]) - 1] if key[0] == "u" else getattr(group, key)


def _set(group: Group, key: str, value: Tensor) -> None:
    if key[0] == "u":
        group.u[int(key[1:]) - 1] = value
    else:
        setattr(group, key, value)


def _launch(column: list[Group], s: Setting, t: int, mean: Mean) -> None:
    for key in ["x", *(f"u{j + 1}" for j in range(len(s.betas))), "v"]:
        due = _due(s, key, t, column[0].x)
        if due.any():
            average = mean(key, t, lambda group: _state(group, key))
            for group in column:
                group.launched.append(Launched(key, t, group.updates, _state(group, key).clone(), average, due))


def _land(group: Group, s: Setting, t: int) -> None:
    """Adds to each state what would be there if the mean had been there when it was launched, with the same gradients
    since."""
    landing = [each for each in group.launched if each.t == t - s.delay + 1]
    for flight in landing:
        group.launched.remove(flight)
        _set(group, flight.key, _state(group, flight.key) + _remaining(flight, group, s))
    _hold(group, s, {flight.key: flight.due for flight in landing}, t)


def _remaining(flight: Launched, group: Group, s: Setting) -> Tensor:
    """What updates have left of the difference that an average makes, where it is due."""
    remaining = torch.where(flight.due, flight.mean - flight.own, 0.0)
    for update in range(flight.updates, group.updates):
        if s.rule == "adopt" and update == 0:
            remaining = remaining * (0 if flight.key == "v" else 1)
        elif flight.key == "x":
            remaining = remaining * (1 - s.lr * s.weight_decay)
        else:
            remaining = remaining * (s.beta2 if flight.key == "v" else s.betas[int(flight.key[1:]) - 1])
    return remaining


def _server(group: Group, s: Setting, average: Tensor, due: Tensor) -> None:
    if s.outer is None:
        group.x = torch.where(due, average, group.x)
        return
    lr, beta = s.outer
    progress = group.anchor - average
    momentum = beta * group.momentum + progress
    anchor = group.anchor - lr * (progress + beta * momentum)
    group.momentum = torch.where(due, momentum, group.momentum)
    group.anchor = torch.where(due, anchor, group.anchor)
    group.x = torch.where(due, group.anchor, group.x)


def _update(group: Group, s: Setting, g: Tensor) -> None:
    t, group.updates = group.updates, group.updates + 1
    if s.value_clip is not None:
        g = g.clamp(-s.value_clip, s.value_clip)
    if s.rule == "adopt" and t == 0:
        group.v = g * g
        return
    direction = g
    if s.rule == "adopt":
        direction = (g / group.v.sqrt().clamp(min=s.eps)).clamp(-(t**0.25), t**0.25)
    group.u = [beta * u + (1 - beta) * direction for u, beta in zip(group.u, s.betas)]
    momenta, denominator = group.u, torch.ones_like(group.x)
    if s.rule == "adam":
        group.v = v = s.beta2 * group.v + (1 - s.beta2) * g * g
        if s.bias_correction:
            momenta = [u / (1 - beta ** (t + 1)) for u, beta in zip(group.u, s.betas)]
            v = v / (1 - s.beta2 ** (t + 1))
        denominator = v.sqrt() + s.eps
    d = (1 - sum(s.weights)) * direction + sum(w * u for w, u in zip(s.weights, momenta))
    group.x = (1 - s.lr * s.weight_decay) * group.x - s.lr * d / denominator
    if s.rule == "adopt":
        group.v = s.beta2 * group.v + (1 - s.beta2) * g * g
