"""One run of the recipe: the synchronous start, the method at a constant rate, and the decay in one way or several."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.recipe.methods import ENDS, METHODS, NORM_CLIP, Method
from benchmarks.quality.recipe.settings import SETTINGS, Setting
from benchmarks.quality.trial import Alignment, served
from deslo_plugin.algorithm.state_names import OUTER_MOMENTUM, OUTER_PARAMS, PARAMS
from deslo_plugin.errors import NonFiniteError
from deslo_plugin.simulation import Objective, Replicas, SimulationStep

STARTS = Path(__file__).resolve().parents[3] / "build" / "recipe"
EMA = 0.99
CONSTANT, OVER_TIME, DECAYED = "constant", "constant, mean over time", "decayed"
MOMENTS = (CONSTANT, OVER_TIME, DECAYED)


class Together:
    """What all replicas see, as one replica's: synchronous training on the same data."""

    def __init__(self, apart: Any, replicas: int):
        self.start, self.evaluate, self._apart, self._replicas = apart.start, apart.evaluate, apart, replicas

    def losses(self, x: Tensor, replicas: Sequence[int], step: int) -> Tensor:
        everyone = list(range(self._replicas))
        return self._apart.losses(x.expand(self._replicas, -1), everyone, step).mean(0, keepdim=True)


class Course:
    """A setting, a rate and a seed: where its runs begin, and how a method goes on from somewhere."""

    def __init__(self, setting: Setting, lr: float, seed: int):
        self.setting, self.lr, self.seed = setting, lr, seed
        self.apart = setting.objective(seed)
        self.together = Together(self.apart, setting.replicas)

    def objective(self, method: Method) -> Objective:
        return self.together if method.synchronous else self.apart

    def world(self, method: Method, like: Replicas | None = None) -> Replicas:
        """Replicas of ``method`` at the start, or all at the mean of ``like``'s, whose momentum they keep where the
        update stays the same; else it begins anew."""
        setting = self.setting
        done = like.steps if like else 0
        config = method.config(self.lr, setting.switch, done, setting.rule)
        count = 1 if method.synchronous else setting.replicas
        world = Replicas(like.state(PARAMS).mean(0) if like else self.apart.start, config, count)
        if like is None:
            return world
        held, params = like.optimizer.state_dict(), world.optimizer.state_dict()["param_groups"]
        rows = {name: state for name, state in held["state"][0].items() if name in ("exp_avg", "exp_avg_sq")}
        counts = {name: state for name, state in held["state"][0].items() if name in ("step", "origin")}
        state = counts | {name: each.mean(0, keepdim=True).expand(count, -1).clone() for name, each in rows.items()}
        own, other = (each.config.desloc.at(int(done)) for each in (world, like))
        if done > setting.switch and (own.betas, own.weights) != (other.betas, other.weights):
            state["exp_avg"].zero_()
        if method.outer:  # as where ``synchronous_steps`` end
            state |= {OUTER_PARAMS: world.state(PARAMS), OUTER_MOMENTUM: torch.zeros_like(state["exp_avg"])}
        world.optimizer.load_state_dict({"state": {0: state}, "param_groups": params})
        return world

    def walk(self, world: Replicas, objective: Objective, until: int) -> Iterator[SimulationStep]:
        """Steps until ``until`` are complete."""
        while world.steps < until:
            step = int(world.steps)
            x = world.state(PARAMS).requires_grad_()
            with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.bfloat16):
                losses = objective.losses(x, world.ids, step)
            (gradients,) = torch.autograd.grad(losses.sum(), x)
            world.step(gradients, rate=self.setting.rate(step), norm_clip=NORM_CLIP)
            yield SimulationStep(step + 1, losses.detach(), world)

    def start(self) -> Replicas:
        """Synchronous ADOPT at the switch; kept, for all methods begin there."""
        method = METHODS["synchronous ADOPT"]
        world = self.world(method)
        described = f"{self.setting.shape} {self.setting.replicas * self.setting.sequences} {self.setting.shards}"
        described += f" {self.setting.teacher} {self.setting.warm_up} {self.setting.switch} {self.lr} {self.seed}"
        if self.setting.rule != "adopt":
            described += f" {self.setting.rule}"
        if self.setting.shards or self.setting.teacher:
            described += f" {self.setting.replicas}"
        path = STARTS / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.pt"
        if path.exists():
            self.hold(world, torch.load(path, map_location=self.setting.device, weights_only=True))
            return world
        for _ in self.walk(world, self.together, self.setting.switch):
            pass
        STARTS.mkdir(parents=True, exist_ok=True)
        torch.save(self.held(world), path)
        return world

    def held(self, world: Replicas) -> dict[str, Any]:
        """All of ``world``, where no average is under way."""
        return {"params": world.state(PARAMS), "optimizer": world.optimizer.state_dict()}

    @torch.no_grad()
    def hold(self, world: Replicas, held: dict[str, Any]) -> None:
        world.optimizer.param_groups[0]["params"][0].copy_(held["params"])
        world.optimizer.load_state_dict(held["optimizer"])

    def nats(self, objective: Objective, x: Tensor) -> float:
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.bfloat16):
            return float(objective.evaluate(x))


def train(setting: str, method: str, lr: float, seed: int, ends: bool = False) -> dict[str, Any]:
    """Held-out nats of what training would hand out: before the decay, of its mean over time then, and after it.

    With ``ends`` also after each of the other decays. ``cosines`` are of the second half of the constant rate.
    ``sent``: vectors of the model's size that one replica put into averages after the switch. Infinite where it broke.
    """
    torch.set_num_threads(1)
    course, plan = Course(SETTINGS[setting], lr, seed), METHODS[method]
    found: dict[str, Any] = dict.fromkeys(MOMENTS, math.inf)
    given = {"setting": setting, "method": method, "lr": lr, "seed": seed}
    try:
        world = course.world(plan, None if plan.at_once else course.start())
        objective, decay = course.objective(plan), course.setting.decay
        alignment, over_time = Alignment(decay), torch.zeros(())
        for moment in course.walk(world, objective, decay):
            mean = served(world)
            over_time = mean if moment.steps <= course.setting.switch + 1 else EMA * over_time + (1 - EMA) * mean
            if not plan.synchronous:
                alignment.look(moment)
        found[CONSTANT], found[OVER_TIME] = (course.nats(objective, x) for x in (mean, over_time))
        for end in ENDS if ends else ():
            found[f"decayed, {end}"] = ended(course, world, ENDS[end](plan))[0]
        found[DECAYED], found[f"{DECAYED}, mean over time"] = decayed(course, world, objective)
        if not plan.synchronous:
            found["sent"] = sum(world.optimizer.stats.bytes.values()) / (4 * course.apart.start.numel())
            found |= {f"cosine of {name}": value for name, value in alignment.cosines().items()}
    except NonFiniteError:
        pass
    return given | {name: value and round(value, 4) for name, value in found.items()}


def ended(course: Course, world: Replicas, method: Method) -> tuple[float, float]:
    """The rest of the run as ``method``, from the mean of ``world``, which is left as it is."""
    return decayed(course, course.world(method, world), course.objective(method))


def decayed(course: Course, world: Replicas, objective: Objective) -> tuple[float, float]:
    """Nats at the end, of what is handed out and of its mean over the last tenth of the decay's steps."""
    last = []
    for moment in course.walk(world, objective, course.setting.steps):
        if moment.steps > course.setting.steps - (course.setting.steps - course.setting.decay) // 10:
            last.append(served(world))
    return course.nats(objective, last[-1]), course.nats(objective, torch.stack(last).mean(0))
