"""Which rate each method trains best at: the same grid, the same seed and the same question for all."""

from collections.abc import Mapping

from benchmarks.quality.ledger import Ledger
from benchmarks.quality.methods import Preset, Run, run, tuning

Chosen = Mapping[tuple[str, bool], list[Run]]
"""(method, warm-up) -> its run for each seed."""


def at_best_rate(preset: Preset, ledger: Ledger) -> Chosen:
    """Every method's runs at the rate with the lowest validation loss at the end on the first seed."""

    def loss(each: Run) -> float:
        end = ledger.final(each)
        return float("inf") if end is None else end

    best = {variant: min(grid, key=lambda rate: loss(grid[rate])) for variant, grid in tuning(preset).items()}
    return {
        (name, warm_up): [run(preset, name, rate=rate, seed=seed, warm_up=warm_up) for seed in preset.seeds]
        for (name, warm_up), rate in best.items()
    }
