"""What ``sequence_jobs`` plays, with every replica in one process, in float64: Adam, periods and means, and no
package."""

import copy
from typing import Any

import torch
from torch import Tensor

from tests.support.sequence_jobs import (
    BETA1,
    BETA2,
    CLIP,
    EPS,
    LR,
    RANKS,
    Net,
    loss_of,
    micro_batches,
    replica_of,
    scribble,
)


class Oracle:
    """The same sequence with every replica in one process, in float64: Adam, periods and means, and no package."""

    STATES = ("params", "exp_avg", "exp_avg_sq")

    def __init__(self, replicas: int, periods: dict[str, int | None], deslo: dict[str, Any], stock: bool):
        start = dict(Net().cpu().double().named_parameters())
        self.replicas, self.periods, self.step, self.kept, self.stock = replicas, periods, 0, None, stock
        self.after = deslo.get("average_at") == "after_step"
        self.trained, self.frozen, self.settled = ["rows", "matrix", "scale"], set(), set()
        self.state = [
            {
                state: {
                    name: x.detach().clone() if state == "params" else torch.zeros_like(x) for name, x in start.items()
                }
                for state in self.STATES
            }
            for _ in range(replicas)
        ]
        self.clock = dict.fromkeys(self.trained, 0)  # completed steps of a parameter
        self.updates = [dict.fromkeys(start, 0) for _ in range(replicas)]  # the rule's own count

    def play(self, action: tuple) -> None:
        what, *details = action
        getattr(self, what.replace(" ", "_"))(*details)

    def train(self, how: str = "plain", skipped: int | None = None) -> None:
        gradients = [self.gradient(replica, how) for replica in range(self.replicas)]
        if how == "clipped":
            gradients = [clipped(each) for each in gradients]
        if not self.after:
            self.average()
        for replica, gradient in enumerate(gradients):
            if replica != skipped:
                for name in gradient:
                    self.update(replica, name, gradient[name])
        self.clock = {name: steps + 1 for name, steps in self.clock.items()}
        if self.after:
            self.average()
        self.step += 1

    def gradient(self, replica: int, how: str) -> dict[str, Tensor]:
        names = [name for name in self.trained if name not in self.frozen]
        params = {name: x.clone().requires_grad_(name in names) for name, x in self.state[replica]["params"].items()}
        ranks = [rank for rank in range(RANKS) if replica_of(rank, self.replicas) == replica]
        model = lambda words: torch.func.functional_call(SHAPE, params, words.cpu())
        total = sum(
            loss_of(model, rank, self.step, micro, torch.float64)
            for rank in ranks
            for micro in range(micro_batches(how, replica))
        ) / len(ranks)
        return dict(zip(names, torch.autograd.grad(total, [params[name] for name in names])))

    def update(self, replica: int, name: str, g: Tensor) -> None:
        x, u, v = (self.state[replica][state] for state in self.STATES)
        self.updates[replica][name] += 1
        t = self.updates[replica][name]
        u[name] = BETA1 * u[name] + (1 - BETA1) * g
        v[name] = BETA2 * v[name] + (1 - BETA2) * g * g
        x[name] = x[name] - LR * (u[name] / (1 - BETA1**t)) / ((v[name] / (1 - BETA2**t)).sqrt() + EPS)

    def average(self) -> None:
        for name, steps in self.clock.items():
            due = [state for state in self.STATES if (period := self.periods[state]) and steps and steps % period == 0]
            for state in due if name not in self.settled else ():
                self.mean(state, name)
                if self.stock and state != "params":
                    self.create(state, name)
            if name in self.frozen and "params" in due:
                self.settled.add(name)  # it is equal everywhere, and averages no more

    def mean(self, state: str, name: str) -> None:
        mean = sum(each[state][name] for each in self.state) / self.replicas
        for each in self.state:
            each[state][name] = mean.clone()

    def create(self, state: str, name: str) -> None:
        """A stock optimizer's replica that has left out every update of a parameter counts from here as its group does,
        or from 1."""
        group = [each for each in self.trained if (each == "late") == (name == "late")]
        for replica, updates in enumerate(self.updates):
            if not updates[name] and self.state[replica][state][name].any():
                updates[name] = max(updates[each] for each in group) or 1

    def skip(self, who: int) -> None:
        self.train(skipped=replica_of(who, self.replicas))

    def write(self, how: str, who: int | None) -> None:
        for replica, state in enumerate(self.state):
            if who is None or replica == replica_of(who, self.replicas):
                scribble(state["params"], how)

    def freeze(self) -> None:
        self.frozen.add("matrix")

    def join(self) -> None:
        if "late" not in self.trained:
            self.trained.append("late")
            self.clock["late"] = self.clock["rows"]

    def keep(self) -> None:
        self.kept = copy.deepcopy((self.state, self.clock, self.updates, self.step, self.trained))

    def go_back(self) -> None:
        if self.kept and self.kept[-1] == self.trained:
            self.state, self.clock, self.updates, self.step, self.trained = copy.deepcopy(self.kept)

    def save_and_load(self, mode: str) -> None:
        if mode != "per_replica":
            self.average_now()

    def average_now(self) -> None:
        for name in self.state[0]["params"]:
            for state in self.STATES:
                self.mean(state, name)
            furthest = max(updates[name] for updates in self.updates)
            for updates in self.updates:  # one model counts in one way: as the replica that left out the fewest steps
                updates[name] = furthest


SHAPE = Net().cpu().double()


def apart(value: Tensor, expected: Tensor) -> float:
    """The largest difference; of squared gradients, which reach hundreds in float32, in units of the tenth of the
    largest value."""
    return float((value - expected.view_as(value)).abs().max() / max(1.0, float(expected.abs().max()) / 10))


def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    return {name: g * min(1.0, float(CLIP / (norm + 1e-6))) for name, g in gradients.items()}
