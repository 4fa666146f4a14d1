"""Which parameters average: those that train, by what all replicas last found alike.

A script may freeze and unfreeze between steps (``requires_grad_``). A parameter that begins to train takes local steps
at once. It averages with the others from the next average of parameters on, at which replicas compare what they train:
so lists of different lengths never meet. One that is frozen takes part in that average once more, and is equal
everywhere then."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.step_counter import Clock
from deslo_plugin.comm.transport import Transport
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.local_tensors import local

Group = MutableMapping[str, Any]


def trains(param: Tensor) -> bool:
    """Whether a step may change ``param``: torch's optimizers step whatever has a gradient, wherever it comes from."""
    return param.requires_grad or param.grad is not None


class Members:
    """What of param groups averages. ``names``: what messages call parameters."""

    def __init__(self) -> None:
        self.names: Mapping[Tensor, str] = {}
        self._known: dict[int, bool] = {}  # id of a parameter -> whether it averages
        self._alive: list[Tensor] = []  # so that no id is given anew

    def averages(self, param: Tensor) -> bool:
        """One that was never seen does if it trains."""
        known = self._known.get(id(param))
        return self._learn(param, trains(param)) if known is None else known

    def _learn(self, param: Tensor, averages: bool) -> bool:
        if id(param) not in self._known:
            self._alive.append(param)
        self._known[id(param)] = averages
        return averages

    def of(self, group: Group) -> list[Tensor]:
        """The parameters of ``group`` that average."""
        return [param for param in group["params"] if self.averages(param)]

    def forget(self) -> None:
        """The parameters are others now."""
        self._known.clear()
        self._alive.clear()

    def numel(self, group: Group) -> int:
        """Elements of ``group`` that average, on this rank."""
        return sum(param.numel() for param in local(self.of(group)))

    def active(self, group: Group) -> list[Tensor]:
        """The parameters of ``group`` that average or train, or both."""
        return [param for param in group["params"] if self.averages(param) or trains(param)]

    def cohorts(self, groups: Sequence[Group], clock: Clock) -> list[Cohort]:
        """Those that average, by ``clock``; behind them those that train and do not average yet, which have no
        periods."""
        cohorts: list[Cohort] = []
        newcomers: list[Cohort] = []
        for group in groups:
            if all(map(self._known.get, map(id, group["params"]))):  # as in most steps
                cohorts += clock.cohorts(group, list(group["params"]))
                continue
            for cohort in clock.cohorts(group, self.active(group)):
                averages = [self.averages(param) for param in cohort.params]
                if all(averages):
                    cohorts.append(cohort)
                    continue
                old = [param for param, averaged in zip(cohort.params, averages) if averaged]
                new = [param for param, averaged in zip(cohort.params, averages) if not averaged]
                cohorts += [cohort._replace(params=old)] if old or not new else []
                newcomers += [cohort._replace(params=new, periods={})] if new else []
        # nothing averages, at which others could be asked
        if newcomers and not any(cohort.params for cohort in cohorts):
            self.settle(param for cohort in newcomers for param in cohort.params)
            return self.cohorts(groups, clock)
        return cohorts + newcomers

    def moved(self, groups: Sequence[Group]) -> bool:
        """Whether this replica trains others than those that average."""
        return any(self.averages(param) != trains(param) for group in groups for param in group["params"])

    def agree(self, average: Transport, groups: Sequence[Group]) -> int:
        """Compares what is trained over replicas: those that begin average from now on. Returns the bytes sent.

        Collective over all ranks. Raises ``ConfigError`` on every rank where a parameter is trained on some replicas
        only."""
        params = [param for group in groups for param in group["params"]]
        mine = torch.tensor([float(trains(param)) for param in params], dtype=torch.float32, device=params[0].device)
        means = mine.repeat(average.divisor)
        average.start(means).wait()
        different = [i % len(params) for i, mean in enumerate(means.tolist()) if mean not in (0.0, 1.0)]
        if average.any(bool(different)):
            name = self.name(params[different[0]], groups) if different else "on other ranks"
            raise ConfigError(
                f"parameter {name}",
                "training on every replica or on none (requires_grad)",
                "on some only",
                "freeze and unfreeze alike on every rank",
            )
        for param in filter(trains, params):
            self._learn(param, True)
        return mine.nbytes

    def settle(self, params: Iterable[Tensor]) -> None:
        """``params`` are equal on all replicas: those that are frozen need no average more."""
        for param in params:
            self._learn(param, trains(param))

    def name(self, param: Tensor, groups: Sequence[Group]) -> str:
        """Its name in the model, where that is known, or its place."""
        places = {p: f"{i} of param group {j}" for j, group in enumerate(groups) for i, p in enumerate(group["params"])}
        return self.names.get(param) or places.get(param, "")
