"""Hours at 1B to 13B parameters on 10 and 100 Gbit/s, by the planner: what docs/results-without-switch.md shows
beside the papers' figures.

    python -m benchmarks.quality.extrapolate

Assumed: 4 replicas of one node of 8 GPUs, 989 TFLOP/s each at an MFU of 40%, 20 tokens for each parameter, bfloat16
gradients, float32 averages, and a latency of 1 ms. Everything else is what ``deslo plan`` assumes.
"""

from dataclasses import replace
from pathlib import Path

from deslo_plugin import load_config
from deslo_plugin.config.schema import Config
from deslo_plugin.planning.comparison import HIDDEN, OWN, SYNCHRONOUS, Job, methods
from deslo_plugin.planning.forecast import Link, compute_seconds

FILES = Path(__file__).resolve().parents[2] / "configs"
REPLICAS, GPUS, PEAK, MFU = 4, 8, 989e12, 0.4
TOKENS_PER_PARAMETER = 20
LATENCY = 1e-3
SIZES = {"1B": (1.3e9, 0.5e6), "7B": (7e9, 2e6), "13B": (13e9, 4e6)}  # parameters, tokens of a step of all replicas
RATES = (10.0, 100.0)  # Gbit/s
# MT-DAO with one momentum sends what Local Adam sends
CONFIGS = {"Local Adam, MT-DAO": "local-adam", "DES-LOC": "des-loc-adam"}
PERIODS = (32, 128)
COLUMNS = (
    "",
    "Gbit/s",
    "synchronous, h",
    "hidden at best, h",
    *(f"{name}, K = {K}" for K in PERIODS for name in CONFIGS),
)


def job(size: str, config: Config) -> Job:
    numel, tokens = SIZES[size]
    step_s = compute_seconds(numel, tokens, PEAK * REPLICAS * GPUS, MFU)
    return Job(config, int(numel), REPLICAS, GPUS, step_s, int(TOKENS_PER_PARAMETER * numel / tokens), "bfloat16")


def stretched(name: str, K: int) -> Config:
    """The file of ``configs/``, for nodes of ``GPUS``, with all periods in proportion to K for the parameters."""
    config = load_config(FILES / f"{name}.json")
    periods = {
        state: every * K // config.optimizer.periods["params"] for state, every in config.optimizer.periods.items()
    }
    return replace(
        config, optimizer=replace(config.optimizer, periods=periods), deslo=replace(config.deslo, replica_size=GPUS)
    )


def rows() -> list[tuple[str, ...]]:
    """Hours, and of local methods how many times fewer than the waiting and the best hidden synchronous training."""
    shown = []
    for size in SIZES:
        for rate in RATES:
            link = Link(rate, LATENCY)
            hours = {each.name: each.on(link).hours for each in methods(job(size, stretched("des-loc-adam", 32)))}
            cells = []
            for K in PERIODS:
                for name in CONFIGS.values():
                    own = (
                        next(each for each in methods(job(size, stretched(name, K))) if each.name == OWN).on(link).hours
                    )
                    cells.append(f"{hours[SYNCHRONOUS] / own:.2f} / {hours[HIDDEN] / own:.2f}")
            shown.append((size, f"{rate:g}", f"{hours[SYNCHRONOUS]:.4g}", f"{hours[HIDDEN]:.4g}", *cells))
    return shown


def markdown() -> str:
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown())
