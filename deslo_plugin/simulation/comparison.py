"""Algorithms side by side: each one's config, and the curve that it draws in a scene."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path
from statistics import median

from deslo_plugin.config.file import read_file
from deslo_plugin.config.load import load_config
from deslo_plugin.config.reader import Reader
from deslo_plugin.config.schema import Config
from deslo_plugin.config.shipped import find_config
from deslo_plugin.errors import ConfigError, NonFiniteError
from deslo_plugin.simulation.objectives import Objective
from deslo_plugin.simulation.run import SimulationStep

SYNCHRONOUS = "synchronous"


@dataclass(frozen=True)
class Algorithm:
    """``norm_clip``: bound on each replica's gradient norm, ``gradient_clipping`` of the file; None without one."""

    name: str
    config: Config
    norm_clip: float | None


@dataclass(frozen=True)
class Curve:
    """One run: ``losses[i]`` at the mean of ``replicas[i]`` replicas' parameters after ``steps[i]`` steps.

    ``bytes``: what one replica that is there from start to end sends for averages. ``diverged``: the steps after which
    loss or momenta were no numbers any more, where the curve ends; None if they always were.
    """

    seed: int
    steps: list[int]
    losses: list[float]
    replicas: list[int]
    bytes: int
    diverged: int | None

    @property
    def late(self) -> list[float]:
        """Losses of the last tenth; [inf] where it diverged."""
        return [inf] if self.diverged is not None else self.losses[-max(1, len(self.losses) // 10) :]

    @property
    def end(self) -> float:
        """Median of the last tenth: single losses are noisy."""
        return median(self.late)


def follow(objective: Objective, moments: Iterable[SimulationStep], *, every: int, seed: int) -> Curve:
    """Iterates ``moments`` of a simulation to the end, or until it diverges, with a look every ``every`` steps."""
    steps, losses, replicas, done, sent, diverged = [], [], [], 0, 0, None
    try:
        for done, _, world in moments:
            sent = sum(world.optimizer.stats.bytes.values())
            if done % every == 0:
                loss = float(objective.evaluate(world.state("params").mean(0, keepdim=True)))
                if not isfinite(loss):
                    raise NonFiniteError(f"loss after {done} steps: {loss}")
                steps.append(done)
                losses.append(loss)
                replicas.append(len(world.ids))
    except NonFiniteError:
        diverged = done
    return Curve(seed, steps, losses, replicas, sent, diverged)


def read_contestants(
    names: Sequence[str], *, lr: float | None = None, synchronous_steps: int | None = None
) -> list[Algorithm]:
    """The configs, under the names of their files.

    Args:
        names: files, or names of files in configs/: ``"des-loc-adam"``, ``"toy/des-loc"``.
        lr: in place of the rate of each.
        synchronous_steps: adds the first of them as synchronous training: its gradients averaged at each of so many
        steps.

    Raises ``ConfigError`` for a name that is not found, given twice, or no config of DesLoc.
    """
    if lr is not None and not 0 <= lr < inf:
        raise ConfigError("--lr", "a number >= 0", f"{lr:g}", "correct it")
    found = [_read(find_config(name), lr) for name in names]
    for index, each in enumerate(found):
        if each.name in [other.name for other in found[:index]]:
            raise ConfigError("--config", "configs of different names", f"{each.name} twice", "rename a file")
    if synchronous_steps is not None:
        first = found[0].config
        config = replace(first, deslo=replace(first.deslo, synchronous_steps=synchronous_steps))
        found.append(replace(found[0], name=SYNCHRONOUS, config=config))
    return found


def _read(path: Path, lr: float | None) -> Algorithm:
    blocks = read_file(path)
    config = load_config(blocks)
    if config.optimizer is None:
        raise ConfigError(
            f"--config {path}",
            'a config of "type": "DesLoc"',
            "one for a stock optimizer",
            "write its periods into optimizer.params.sync_every",
        )
    clip = Reader(str(path), {"gradient_clipping": blocks.get("gradient_clipping", 0.0)}).number(
        "gradient_clipping", 0.0
    )
    if lr is not None:
        config = replace(config, optimizer=replace(config.optimizer, lr=lr))
    return Algorithm(path.stem, config, clip or None)
