"""What is compared: what each method does after the synchronous start, and what may be done in the decay of the rate.

All runs of a setting and a seed are one run until the switch: synchronous ADOPT. Only then do they differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAST, SLOW, WEIGHT = 0.9, 0.99, 0.95  # the half-life of the slow one, 69 steps, is a 22nd of what follows the switch
BETA2, NORM_CLIP, PERIOD = 0.999, 1.0, 32


@dataclass(frozen=True)
class Method:
    """``every``: the periods of parameters, momentum and second moment, in steps. ``beta``, ``weight``, ``lr_factor``,
    ``reset``: the update after the switch. ``synchronous``: gradients are averaged to the end. ``at_once``: no
    synchronous start, the update is from the first step what it is after the switch elsewhere. ``wire``: the dtype in
    which averages travel."""

    every: tuple[int | None, ...] = (PERIOD, PERIOD, PERIOD)
    beta: float = FAST
    weight: float = 1.0
    lr_factor: float = 1.0
    reset: bool = True
    outer: Mapping[str, float] | None = None
    synchronous: bool = False
    at_once: bool = False
    wire: str | None = None

    @property
    def switches(self) -> bool:
        return (self.beta, self.weight, self.lr_factor) != (FAST, 1.0, 1.0)

    def config(self, lr: float, switch: int, done: int = 0, rule: str = "adopt") -> dict[str, Any]:
        """As ``DesLoc`` takes it, for a run of which ``done`` steps are done: from ``switch`` on there is none to
        make."""
        x, u, v = self.every
        after = self.at_once or done > switch
        params: dict[str, Any] = {
            "rule": rule,
            "lr": lr * self.lr_factor if after else lr,
            "momenta": [
                {"beta": self.beta if after else FAST, "weight": self.weight if after else 1.0, "sync_every": u}
            ],
            "second_moment": {"beta": BETA2, "sync_every": v},
            "sync_every": {"params": x},
        }
        if self.outer:
            params["outer_optimizer"] = dict(self.outer)
        if self.switches and not after:
            params["switch"] = {"at": switch, "betas": [self.beta], "weights": [self.weight]}
            params["switch"] |= {"lr_factor": self.lr_factor, "reset": ["exp_avg"] if self.reset else []}
        # one replica of all ranks is synchronous training, whose update switches in time
        local = self.synchronous or self.at_once or done > switch
        deslo: dict[str, Any] = {"synchronous_steps": 0 if local else switch}
        if self.wire:
            deslo["wire_dtype"] = self.wire
        return {"optimizer": {"params": params}, "deslo": deslo}


def slow(beta: float = SLOW, weight: float = WEIGHT, **options: Any) -> Method:
    return Method(beta=beta, weight=weight, **options)


NESTEROV = {"lr": 0.6, "momentum": 0.9}
RECIPE = {
    "synchronous ADOPT": Method(synchronous=True),
    "synchronous QH": slow(synchronous=True),
    "synchronous QH, rate x 2": slow(lr_factor=2.0, synchronous=True),
    "Local ADOPT": Method(),
    "DES-LOC, 32 / 96 / 192": Method((PERIOD, 3 * PERIOD, 6 * PERIOD)),
    "MT-DAO": slow(),
    "MT-DAO, rate x 2": slow(lr_factor=2.0),
}
CORE = ("synchronous ADOPT", "Local ADOPT", "MT-DAO, rate x 2")
ABLATED = {
    "MT-DAO, rate x 2, momentum kept": slow(lr_factor=2.0, reset=False),
    "MT-DAO, rate x 2, no synchronous start": slow(lr_factor=2.0, at_once=True),
    "Local ADOPT, no synchronous start": Method(at_once=True),
    "MT-DAO, rate x 2, 32 / 96 / 192": slow(lr_factor=2.0, every=(PERIOD, 3 * PERIOD, 6 * PERIOD)),
    "MT-DAO, rate x 2, 128 for all": slow(lr_factor=2.0, every=(128, 128, 128)),
    "Local ADOPT, 128 for all": Method((128, 128, 128)),
}
BETAS = {
    f"MT-DAO, beta {beta:g}, weight {weight:g}, rate x {factor:g}": slow(beta, weight, lr_factor=factor)
    for beta in (0.95, 0.99, 0.999)
    for weight in (0.8, 0.95)
    for factor in (1.0, 2.0)
}


def outer(lr: float, momentum: float, base: Method = Method()) -> Method:
    return Method(base.every, base.beta, base.weight, base.lr_factor, base.reset, {"lr": lr, "momentum": momentum})


OUTER = {
    f"{name}, outer {lr:g} / {momentum:g}": outer(lr, momentum, base)
    for name, base in (("DiLoCo", Method((PERIOD, None, None))), ("MT-DAO, rate x 2", slow(lr_factor=2.0)))
    for lr, momentum in ((1.0, 0.0), (0.5, 0.9), (0.7, 0.6), (0.9, 0.9))
}
BUDGET = {
    "Local ADOPT, 8 for all, int8": Method((8, 8, 8), wire="int8"),
    "Local ADOPT, 4 for all, int4": Method((4, 4, 4), wire="int4"),
    "DES-LOC, 4 / 12 / 24, int8": Method((4, 12, 24), wire="int8"),
    "DES-LOC, 2 / 6 / 12, int4": Method((2, 6, 12), wire="int4"),
    "FAVG+OPT, 3, int8": Method((3, None, None), wire="int8"),
    "FAVG+OPT, 2, int4": Method((2, None, None), wire="int4"),
    "MT-DAO, rate x 2, 8 for all, int8": slow(lr_factor=2.0, every=(8, 8, 8), wire="int8"),
    "MT-DAO, rate x 2, 4 / 12 / 24, int8": slow(lr_factor=2.0, every=(4, 12, 24), wire="int8"),
    "MT-DAO, rate x 2, 4 for all, int4": slow(lr_factor=2.0, every=(4, 4, 4), wire="int4"),
    "MT-DAO, rate x 2, 32 for all, int8": slow(lr_factor=2.0, wire="int8"),
}
"""Ten times fewer bytes than float32 gradients at every step, spent on short periods."""
METHODS = RECIPE | ABLATED | BETAS | OUTER | BUDGET

SYNCHRONOUS_ENDS = {
    "synchronous, same update": lambda method: Method(
        beta=method.beta, weight=method.weight, lr_factor=method.lr_factor, synchronous=True
    ),
    "synchronous ADOPT": lambda method: Method(synchronous=True),
}


def with_periods(every: Sequence[int | None]) -> Any:
    return lambda method: Method(tuple(every), method.beta, method.weight, method.lr_factor)


ENDS: dict[str, Any] = SYNCHRONOUS_ENDS | {
    "periods of 8": with_periods((8, 8, 8)),
    "parameters every 8": with_periods((8, PERIOD, PERIOD)),
    "Local ADOPT": lambda method: Method(),
    "Local ADOPT, periods of 8": lambda method: Method((8, 8, 8)),
}
"""What a run may go on with in the decay of the rate, from the mean of its replicas: a method made of its own."""
