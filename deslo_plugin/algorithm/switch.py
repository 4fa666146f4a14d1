"""The switch of MT-DAO's recipe: at one step, another update (the first author's public code; not in arXiv 2510.05361).

All steps before it are of the ordinary momentum, usually synchronous: ``deslo.synchronous_steps``. At the switch other
betas and weights begin, momenta are set to 0, the second moment stays, and the rate is multiplied by a factor:

    t < at:  u_j <- beta_j u_j + (1 - beta_j) g       d = (1 - sum_j w_j) g + sum_j w_j u_j      rate eta
    t = at:  u_j <- 0   of those that are reset
    t >= at: the same with beta'_j and w'_j                                                       rate eta * lr_factor

The rule's own count goes on, as in the author's code: where Adam corrects bias, 1 - beta'_j^(t+1) counts t from the
first update of all, so that a momentum that was reset grows from 0 over its own half-life."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Once ``at`` steps are complete, the first momenta have ``betas`` and ``weights``, those named in ``reset`` are 0,
    and updates multiply the rate that a param group or a scheduler gives by ``lr_factor``."""

    at: int
    betas: tuple[float, ...]
    weights: tuple[float, ...]
    lr_factor: float
    reset: tuple[str, ...]

    def __str__(self) -> str:
        return f"after step {self.at:,} {self.change}"

    @property
    def change(self) -> str:
        """All of it but when."""
        betas, weights = (", ".join(f"{each:g}" for each in numbers) for numbers in (self.betas, self.weights))
        reset = ", ".join(self.reset) if self.reset else "no momentum"
        return f"betas {betas}, weights {weights}, lr x {self.lr_factor:g}; {reset} reset to 0"

    def as_dict(self) -> dict[str, Any]:
        """As plain data, which ``saved`` reads."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def saved(switch: Mapping[str, Any] | None) -> Switch | None:
    """What ``as_dict`` gave. Raises ``TypeError`` or ``ValueError`` for something else."""
    if switch is None:
        return None
    plain: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in switch.items()}
    found = Switch(**plain)
    numbers = [*found.betas, *found.weights, found.lr_factor]
    if type(found.at) is not int or not all(type(each) in (int, float) for each in numbers):
        raise TypeError("a switch of other things than numbers")
    if not all(type(each) is str for each in found.reset):
        raise TypeError("a switch that resets other things than states")
    return found
