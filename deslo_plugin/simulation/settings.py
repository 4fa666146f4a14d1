"""What is simulated, as the options of ``deslo simulate`` say it: an objective, a population and what befalls it."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from deslo_plugin.config.reader import did_you_mean
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.simulation.byte_lm import language, read_text, standard_library
from deslo_plugin.simulation.membership import Failures, Growth, Membership
from deslo_plugin.simulation.objectives import Logistic, Objective, Quadratic, Rosenbrock, normal
from deslo_plugin.simulation.replicas import Replicas
from deslo_plugin.simulation.run import warmup_cosine

START = (-1.2, 1.0)  # of Rosenbrock
LOGISTIC_BATCH = 8  # draws
OPTIONS = {  # what else each objective takes
    "rosenbrock": ("sigma",),
    "quadratic": ("sigma", "spectrum"),
    "logistic": ("spectrum",),
    "bytes": ("data",),
}
SIGMA = {"rosenbrock": 1.5, "quadratic": 1.0}
SPECTRUM = {"quadratic": "0.01:1:100", "logistic": "0.1:1:20"}


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """Everything but the algorithm; the same scene and seed are the same start, noise, data and failures for each.

    Args:
        objective: ``"rosenbrock"``, ``"quadratic"``, ``"logistic"`` or ``"bytes"``, a small language model.
        replicas, steps: how many start, for how long.
        sigma: standard deviation of the noise on each coordinate of the gradient (rosenbrock 1.5, quadratic 1).
        spectrum: eigenvalues (quadratic) or deviations of the features (logistic): ``"1,0.5,0.1"``, or
        ``"low:high:count"``
            on a logarithmic scale.
        data: the text (bytes); by default Python's own modules.
        noniid: how much replicas differ, 0 for not at all. rosenbrock: each has noise of a deviation of its own, drawn
        from
            N(0, noniid). quadratic: deviation of their minima; logistic: of their true weights. bytes: share of its
            windows that a replica reads in a part of the text of its own.
        double_at: steps after which as many replicas join.
        fail_every, fail_share, fail_absent: after every so many steps a share of the replicas fails, and is absent for
        so
            many steps at least (by default 0.05, and ``fail_every`` steps).
        device: where it runs.

    Raises ``ConfigError``, which names the option, for a value that cannot be meant and an option without effect.
    """

    objective: str = "rosenbrock"
    replicas: int = 16
    steps: int = 1000
    sigma: float | None = None
    spectrum: str | None = None
    data: Path | None = None
    noniid: float = 0.0
    double_at: int | None = None
    fail_every: int | None = None
    fail_share: float | None = None
    fail_absent: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.objective not in OPTIONS:
            raise ConfigError(
                "--objective",
                "one of " + ", ".join(OPTIONS),
                repr(self.objective),
                did_you_mean(self.objective, OPTIONS) or "choose one",
            )
        for option in ("sigma", "spectrum", "data"):
            if getattr(self, option) is not None and option not in OPTIONS[self.objective]:
                takers = " and ".join(each for each, taken in OPTIONS.items() if option in taken)
                raise ConfigError(
                    f"--{option}", f"none: it belongs to {takers}", str(getattr(self, option)), "remove it"
                )
        for option in ("replicas", "steps", "double_at", "fail_every", "fail_absent"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(_name(option), "a whole number >= 1", str(value), "correct it, or leave it out")
        for option in ("sigma", "noniid"):
            value = getattr(self, option)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(_name(option), "a number >= 0", f"{value:g}", "correct it")
        self._check_what_befalls_it()
        if self.objective == "rosenbrock" and self.noniid and self.sigma is not None:
            raise ConfigError(
                "--sigma",
                "none beside --noniid, which draws a deviation for each replica",
                f"{self.sigma:g}",
                "keep one of them",
            )
        if self.objective == "bytes" and self.noniid > 1:
            raise ConfigError("--noniid", "a share in [0, 1] of the windows", f"{self.noniid:g}", "correct it")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            got = f"{self.device!r}: {str(error).splitlines()[0]}"
            raise ConfigError("--device", "one of this machine, such as cpu or cuda", got, "choose another") from error

    def _check_what_befalls_it(self) -> None:
        if self.double_at is not None and self.double_at >= self.steps:
            raise ConfigError("--double-at", f"fewer than the {self.steps} steps", str(self.double_at), "lower it")
        if self.fail_every is None:
            for option in ("fail_share", "fail_absent"):
                if getattr(self, option) is not None:
                    raise ConfigError(
                        _name(option), "--fail-every beside it", "none", "say after how many steps replicas fail"
                    )
            return
        if self.replicas == 1:
            raise ConfigError("--fail-every", "two replicas or more", "1", "raise --replicas: somebody has to stay")
        if self.fail_share is not None and not 0 < self.fail_share < 1:
            raise ConfigError(
                "--fail-share", "a number between 0 and 1", f"{self.fail_share:g}", "0.05 is every twentieth"
            )

    @cached_property
    def text(self) -> Tensor:
        """What the language model reads, (length,) uint8."""
        return read_text(standard_library() if self.data is None else [self.data])

    @property
    def capacity(self) -> int:
        """How many replicas ever take part."""
        return self.replicas * (2 if self.double_at else 1)

    @property
    def logarithmic(self) -> bool:
        """Whether losses fall to 0 over orders of magnitude."""
        return self.objective in ("rosenbrock", "quadratic")

    @property
    def looks(self) -> int:
        """Steps between two looks at the loss."""
        return max(1, self.steps // (60 if self.objective == "bytes" else 480))

    def rate(self, step: int) -> float:
        """What multiplies ``lr``: 1; for the language model a warm-up and a cosine, as in configs/."""
        return warmup_cosine(self.steps)(step) if self.objective == "bytes" else 1.0

    def build(self, seed: int) -> Objective:
        """The objective with the noise and data of ``seed``. Raises ``ConfigError`` for a spectrum or text that is not
        one."""
        common: dict[str, int] = {"replicas": self.capacity, "seed": seed}
        sigma = SIGMA.get(self.objective, 0.0) if self.sigma is None else self.sigma
        if self.objective == "rosenbrock":
            own = self.noniid * normal(seed, -3, self.capacity).abs()
            return Rosenbrock(torch.tensor(START, device=self.device), own if self.noniid else sigma, **common)
        if self.objective == "bytes":
            return language(self.text, heterogeneity=self.noniid, device=self.device, **common)
        spectrum = read_spectrum(self.spectrum or SPECTRUM[self.objective]).to(self.device)
        if self.objective == "logistic":
            return Logistic(spectrum, batch=LOGISTIC_BATCH, heterogeneity=self.noniid, **common)
        return Quadratic(torch.ones_like(spectrum), spectrum, sigma, heterogeneity=self.noniid, **common)

    def membership(self, config: Config, seed: int) -> Membership:
        """Who comes and goes. Those that join receive momenta where ``config`` ever averages one, else parameters
        alone."""
        momenta = any(config.desloc.periods[state] for state in config.desloc.moments)
        changes: list[Membership] = []
        if self.double_at is not None:
            changes.append(Growth(self.double_at, self.replicas, momenta))
        if self.fail_every is not None:
            share, absent = self.fail_share or 0.05, self.fail_absent or self.fail_every
            changes.append(Failures(self.fail_every, share, absent, momenta, seed))

        def change(steps: int, replicas: Replicas) -> None:
            for each in changes:
                each(steps, replicas)

        return change


def read_spectrum(text: str) -> Tensor:
    """``"1,0.5,0.1"``, or ``"low:high:count"`` on a logarithmic scale, as (n,) float32. Raises ``ConfigError``."""
    try:
        if ":" in text:
            low, high, count = text.split(":")
            values = torch.logspace(math.log10(float(low)), math.log10(float(high)), int(count))
        else:
            values = torch.tensor([float(each) for each in text.split(",")])
    except (ValueError, RuntimeError):
        values = torch.empty(0)
    if not len(values) or not (values.isfinite() & (values > 0)).all():
        raise ConfigError(
            "--spectrum", "numbers > 0 as 1,0.5,0.1 or low:high:count", repr(text), "write, say, 0.01:1:100"
        )
    return values


def _name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")
