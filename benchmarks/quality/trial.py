"""One run of the study: replicas trained in one process, and what became of them."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.methods import Preset, Run
from benchmarks.simulation.small_gpt import small_gpt
from deslo_plugin import NonFiniteError
from deslo_plugin.algorithm.outer_optimizer import nesterov_
from deslo_plugin.algorithm.state_names import OUTER_MOMENTUM, OUTER_PARAMS, PARAMS
from deslo_plugin.simulation import Replicas, SimulationStep, simulate, warmup_cosine


def warmup_hold(steps: int) -> Callable[[int], float]:
    """Linear over the first tenth of ``steps``, constant, and over the last tenth 1 - sqrt: as in MT-DAO's public
    code."""
    tenth = max(1, steps // 10)
    return lambda step: min((step + 1) / tenth, 1 - math.sqrt(max(0.0, (step - (steps - tenth)) / tenth)))


SCHEDULES = {"cosine": warmup_cosine, "hold": warmup_hold}


def train(run: Run, preset: Preset) -> dict[str, Any]:
    """Trains ``run`` to its end, or until it diverges.

    ``validation`` nats per byte at ``steps``, of the model that training would hand out (``served``), null from where
    it is no number; ``bytes`` that one replica sent; ``progress`` and ``momentum``: cosines of a replica's with the
    mean of all, averaged over replicas and over the second half of the run's periods, null where replicas never part.
    """
    config = {"optimizer": {"type": "DesLoc", **run.blocks["optimizer"]}, "deslo": run.blocks["deslo"]}
    objective = small_gpt(
        preset.shape,
        sequences=run.sequences or preset.sequences,
        replicas=run.replicas,
        seed=run.seed,
        held_out=preset.held_out,
        shards=run.shards,
        device=preset.device,
    )
    steps = run.steps or preset.steps
    curve: dict[str, list[Any]] = {"steps": [], "validation": []}
    alignment = Alignment(steps)
    world = None
    try:
        with torch.autocast(preset.device, torch.bfloat16, enabled=preset.bfloat16):
            for moment in simulate(
                objective,
                config,
                replicas=run.replicas,
                steps=steps,
                norm_clip=run.norm_clip,
                rate=SCHEDULES[preset.schedule](steps),
            ):
                world = moment.replicas
                if moment.steps == 1 and not run.compensated:
                    # the difference lands whole, not what updates leave of it while it travels
                    world.optimizer.averaging.flights.decay = lambda params, factors: None
                alignment.look(moment)
                if moment.steps % preset.look == 0:
                    loss = float(objective.evaluate(served(world)))
                    curve["steps"].append(moment.steps)
                    curve["validation"].append(round(loss, 4) if loss < 100 else None)
    except NonFiniteError:
        curve["steps"].append(steps)
        curve["validation"].append(None)
    return curve | alignment.cosines() | {"bytes": sum(world.optimizer.stats.bytes.values())}


def served(world: Replicas) -> Tensor:
    """The replicas' mean after SERVER, (1, n): with an outer optimizer, where its next step goes."""
    mean, outer = world.state(PARAMS).mean(0, keepdim=True), world.config.optimizer.outer_optimizer
    if outer:
        anchor, momentum = (world.state(name)[:1].clone() for name in (OUTER_PARAMS, OUTER_MOMENTUM))
        nesterov_(
            [torch.empty_like(mean)], [mean], [anchor], [momentum], lr=outer.rate(len(world.ids)), beta=outer.momentum
        )
        return anchor
    return mean


class Alignment:
    """Cosines of replicas with their mean, each time parameters are about to be averaged in the second half of a
    run."""

    def __init__(self, steps: int):
        self.steps, self._anchor, self._seen = steps, None, {"progress": [], "momentum": []}

    def look(self, moment: SimulationStep) -> None:
        """Call it after every step. Progress is counted from where replicas went after their last average."""
        world, deslo = moment.replicas, moment.replicas.config.deslo
        if moment.steps % world.config.optimizer.periods[PARAMS] or deslo.average_at == "after_step":
            return  # there replicas are equal again by now
        rows = world.state(PARAMS)
        if self._anchor is not None and moment.steps > max(self.steps // 2, deslo.synchronous_steps):
            optimizer = world.config.optimizer
            momentum = sum(w * world.state(name) for w, name in zip(optimizer.weights, optimizer.momenta))
            self._seen["progress"].append(cosine(rows - self._anchor))
            self._seen["momentum"].append(cosine(momentum))
        self._anchor = served(world)

    def cosines(self) -> dict[str, float | None]:
        return {name: round(statistics.mean(seen), 4) if seen else None for name, seen in self._seen.items()}


def cosine(rows: Tensor) -> float:
    """Mean cosine of rows (M, n) with their mean; rows that know nothing of each other have 1 / sqrt(M)."""
    return float(torch.cosine_similarity(rows, rows.mean(0, keepdim=True)).mean())
