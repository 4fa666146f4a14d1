"""What the study trains: sizes, methods, and the grid of rates; the ablations are in ablations.py.

Hyper-parameters are those of configs/, without the switch of MT-DAO's recipe. A preset changes periods (a multiple
of those in configs/), and the long memories, which must be short against its run: the slow beta of MT-DAO, beta2 of
ADOPT and, where that slow beta outlives it, of Adam."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.simulation.small_gpt import GPTConfig
from deslo_plugin.config.file import read_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WRITTEN_FOR = 32  # sync_every.params in configs/


@dataclass(frozen=True)
class Preset:
    """The size of a study. ``period`` is K_x; a run is ``steps`` steps of ``sequences`` windows for each replica."""

    shape: GPTConfig
    sequences: int
    steps: int
    period: int
    warm_up: int  # synchronous steps of those runs that have some
    rates: tuple[float, ...]  # the grid, the same for every method
    slow_beta: float
    slow_weight: float
    beta2: Mapping[str, float]  # by rule
    starts: tuple[bool, ...] = (True, False)  # local after the synchronous warm-up, from the first step
    ablated: tuple[str, ...] | None = None  # titles of ablations; None: all that there are
    ablation_rate: float = 6e-3
    schedule: str = "cosine"  # of the rate, see trial.py
    replicas: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)  # rates are compared on the first
    ablation_seeds: tuple[int, ...] = (0, 1)
    look: int = 48  # steps between looks at the validation loss
    held_out: int = 4  # batches of 64 windows to look at
    device: str = "cpu"
    bfloat16: bool = False  # forward and backward; parameters, momenta and what travels stay float32


PRESETS = {
    "short": Preset(
        shape=GPTConfig(dim=48, layers=2, heads=4, context=32),
        sequences=4,
        steps=384,
        period=8,
        warm_up=48,
        rates=(1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2),
        slow_beta=0.97,
        slow_weight=0.9,
        beta2={"adam": 0.95, "adopt": 0.999},
    ),
    "long": Preset(
        shape=GPTConfig(dim=48, layers=2, heads=4, context=32),
        sequences=4,
        steps=3072,
        period=32,
        warm_up=192,
        starts=(True,),
        rates=(1e-3, 2.5e-3, 6e-3, 1.5e-2),
        slow_beta=0.99,
        slow_weight=0.9,
        look=96,
        held_out=8,
        beta2={"adam": 0.99, "adopt": 0.999},
        ablated=(
            "Period of the parameters, DES-LOC",
            "Period of the parameters, MT-DAO",
            "Slow momentum of MT-DAO",
            "The raw gradient beside a momentum of 0.9",
            "Second moment",
            "Fewer synchronous steps",
        ),
    ),
    # the recipe of MT-DAO's author at 16M, on bytes: their vocabulary would be 12.9M of the parameters
    "gpu": Preset(
        shape=GPTConfig(dim=256, layers=4, heads=4, context=2048),
        sequences=16,
        steps=5120,
        period=32,
        warm_up=512,
        rates=(2**-10, 2**-9, 2**-8, 2**-7),
        slow_beta=0.999,
        slow_weight=0.98,
        beta2={"adam": 0.9999, "adopt": 0.9999},
        schedule="hold",
        ablated=(),
        look=128,
        held_out=8,
        device="cuda",
        bfloat16=True,
    ),
}


@dataclass(frozen=True)
class Method:
    """A file of configs/, with other ``params`` where it has no file of its own. ``synchronous``: gradients averaged
    always;
    ``slow``: its last momentum is scaled to the run."""

    config: str
    params: Mapping[str, Any] = field(default_factory=dict)
    synchronous: bool = False
    slow: bool = True


def momenta(*weighed: tuple[float, float]) -> dict[str, Any]:
    """``params`` of (beta, weight) pairs that are the update's from the first step to the last."""
    return {"momenta": [{"beta": beta, "weight": weight, "sync_every": WRITTEN_FOR} for beta, weight in weighed]}


SLOW, FAST_AND_SLOW = momenta((0.97, 0.9)), momenta((0.9, 0.5), (0.97, 0.4))  # without the switch of configs/
ALIKE = {"sync_every": dict.fromkeys(("params", "exp_avg", "exp_avg_sq"), WRITTEN_FOR)}
METHODS = {
    "synchronous AdamW": Method("des-loc-adam", synchronous=True),
    "synchronous ADOPT": Method("des-loc-adopt", synchronous=True),
    "synchronous QH": Method("mt-dao-adam-qh", SLOW, synchronous=True),
    "synchronous QH, ADOPT": Method("mt-dao-adopt-qh", SLOW, synchronous=True),
    "Local Adam": Method("local-adam"),
    "Local ADOPT": Method("des-loc-adopt", ALIKE),
    "FAVG+OPT": Method("favg+opt"),
    "FAVG-OPT": Method("favg-opt"),
    "DiLoCo": Method("diloco", {"outer_optimizer": {"lr": 0.7, "momentum": 0.9}}),
    "DES-LOC": Method("des-loc-adam"),
    "DES-LOC-QH": Method("des-loc-adam-qh", slow=False),
    "DES-LOC-Nesterov": Method("des-loc-nesterov", {"outer_optimizer": {"lr": 1.0, "momentum": 0.9}}),
    "MT-DAO": Method("mt-dao-adam-qh", SLOW),
    "MT-DAO, ADOPT": Method("mt-dao-adopt-qh", SLOW),
    "MT-DAO, two momenta": Method("mt-dao-adam-n2", FAST_AND_SLOW),
}
SYNCHRONOUS = [name for name, method in METHODS.items() if method.synchronous]
LOCAL = [name for name, method in METHODS.items() if not method.synchronous]


@dataclass(frozen=True)
class Run:
    """One training run of a preset: equal runs have equal results, whatever they are called."""

    blocks: Mapping[str, Any]
    norm_clip: float
    replicas: int
    seed: int
    shards: bool = False  # each replica reads a part of the corpus of its own
    sequences: int | None = None  # in place of the preset's
    steps: int | None = None  # in place of the preset's, with the schedule of the rate
    # late averages land as exactly as local steps allow; else as if no update had been in between
    compensated: bool = True

    @property
    def key(self) -> str:
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def run(
    preset: Preset,
    name: str,
    *,
    rate: float,
    seed: int,
    warm_up: bool,
    period: int | None = None,
    sync_every: Mapping[str, int | None] | None = None,
    slow: Mapping[str, float] | None = None,
    weights: Sequence[float] = (),
    outer: Mapping[str, float] | None = None,
    beta2: float | None = None,
    deslo: Mapping[str, Any] | None = None,
    replicas: int | None = None,
    **options: Any,
) -> Run:
    """A run of method ``name``.

    ``period`` replaces the preset's K_x, all others keep their ratio to it; ``sync_every`` replaces single periods
    after that; ``slow`` replaces beta or weight of the slow momentum, ``weights`` those of all, ``outer`` the outer
    optimizer, ``beta2`` the preset's; ``deslo`` adds keys there; ``options`` are fields of ``Run``.
    """
    method, file = METHODS[name], read_file(CONFIGS / f"{METHODS[name].config}.json")
    period = preset.period if period is None or method.synchronous else period
    params = deepcopy(file["optimizer"]["params"] | method.params) | {"lr": rate}
    params.pop("switch", None)  # of a recipe; this study's updates are one from start to end
    scaled = lambda every: every and every * period // WRITTEN_FOR
    params["sync_every"] = {state: scaled(every) for state, every in params["sync_every"].items()}
    if "momenta" in params:
        for entry in (*params["momenta"], params["second_moment"]):
            entry["sync_every"] = scaled(entry["sync_every"])
        if method.slow:
            params["momenta"][-1]["beta"] = preset.slow_beta
            if len(params["momenta"]) == 1:
                params["momenta"][-1]["weight"] = preset.slow_weight
        params["momenta"][-1] |= slow or {}
        for entry, weight in zip(params["momenta"], weights):
            entry["weight"] = weight
    beta2 = preset.beta2[params["rule"]] if beta2 is None else beta2
    if "momenta" in params:
        params["second_moment"]["beta"] = beta2
    else:
        params["betas"][1] = beta2
    if outer:
        params["outer_optimizer"] = dict(outer)
    for state, every in (sync_every or {}).items():
        if "momenta" in params and state != "params":
            (params["second_moment"] if state == "exp_avg_sq" else params["momenta"][0])["sync_every"] = every
        else:
            params["sync_every"][state] = every
    steps = preset.steps if method.synchronous else preset.warm_up if warm_up else 0
    blocks = {"optimizer": {"params": params}, "deslo": {"synchronous_steps": steps} | (deslo or {})}
    return Run(blocks, file["gradient_clipping"], replicas or preset.replicas, seed, **options)


def tuning(preset: Preset) -> dict[tuple[str, bool], dict[float, Run]]:
    """(method, warm-up) -> rate -> its run on the first seed; synchronous methods have no warm-up to tell apart."""
    variants = [
        *((name, False) for name in SYNCHRONOUS),
        *((name, warm_up) for warm_up in preset.starts for name in LOCAL),
    ]
    return {
        (name, warm_up): {
            rate: run(preset, name, rate=rate, seed=preset.seeds[0], warm_up=warm_up) for rate in preset.rates
        }
        for name, warm_up in variants
    }


"""Variant -> its run for each seed; the first is what the others are compared with."""
