"""What the oracle's settings are called in the two config blocks and in the states of the package."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Switch:
    """When step ``at`` begins the update gets these numbers (MT-DAO's recipe); ``reset``: first momenta, from 1 on."""

    at: int
    betas: list[float]
    weights: list[float]
    lr_factor: float = 1.0
    reset: tuple[int, ...] = ()

    @property
    def block(self) -> dict:
        """As it stands in a config."""
        reset = [f"exp_avg_{j}" if j > 1 else "exp_avg" for j in self.reset]
        return vars(self) | {"reset": reset}


def blocks(s: Any, **deslo: object) -> dict:
    """The two config blocks that mean ``s``, with ``deslo`` as given."""

    def every(key: str) -> object:
        if key not in s.adaptive:
            return s.periods[key]
        longest, drift = s.adaptive[key]
        return {"adaptive": {"min": s.periods[key], "max": longest, "drift": drift}}

    momenta = [
        {"beta": beta, "weight": weight, "sync_every": every(f"u{j + 1}")}
        for j, (beta, weight) in enumerate(zip(s.betas, s.weights))
    ]
    params = {"rule": s.rule, "lr": s.lr, "weight_decay": s.weight_decay, "momenta": momenta}
    params["sync_every"] = {"params": s.periods["x"]}
    if s.rule != "sgdm":
        params |= {"eps": s.eps, "second_moment": {"beta": s.beta2, "sync_every": every("v")}}
    if s.rule == "adam":
        params["bias_correction"] = s.bias_correction
    if s.value_clip is not None:
        params["clip_value"] = s.value_clip
    if s.reset:
        params["reset_momenta"] = True
    if s.outer is not None:
        params["outer_optimizer"] = {"lr": s.outer[0], "momentum": s.outer[1]}
    if s.delay > 1:
        deslo["sync_delay"] = s.delay
    if s.offsets:
        deslo["fragments"] = max(map(len, s.offsets.values()))
    if s.switch is not None:
        params["switch"] = s.switch.block
    when = "after_step" if s.after_update else "before_step"
    return {"optimizer": {"type": "DesLoc", "params": params}, "deslo": {"average_at": when, **deslo}}


def states(s: Any, group: Any) -> dict[str, Tensor]:
    """What ``DesLoc`` calls params, exp_avg, ..., exp_avg_sq."""
    names = [f"exp_avg_{j}" if j > 1 else "exp_avg" for j in range(1, len(s.betas) + 1)]
    return {"params": group.x} | dict(zip(names, group.u)) | ({} if s.rule == "sgdm" else {"exp_avg_sq": group.v})
