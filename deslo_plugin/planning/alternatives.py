"""Other periods for the states of a config: what the same job would average under the papers' names and rules."""

from collections.abc import Mapping
from dataclasses import replace

from deslo_plugin.algorithm.adaptive_periods import adaptive, params_period, shortest
from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.algorithm.schedule import Periods, half_life_period
from deslo_plugin.algorithm.state_names import PARAMS, SECOND_MOMENT
from deslo_plugin.config.periods import MULTIPLE_OF_PARAMS
from deslo_plugin.config.schema import Config, DesloConfig
from deslo_plugin.config.wire import Wire, settle_wire

FEW_BITS = "int8"
"""What states may travel as without a loss that was seen, by docs/wire.md."""
LOCAL = {name: f"Local {rule.title}" for name, rule in RULES.items()}


def periods_of(config: Config) -> Periods:
    """State -> period, of a DesLoc or of a stock optimizer; the shortest of those that adapt."""
    return shortest(config.schedule)


def papers_default(periods: Periods) -> Periods:
    """Momenta at 3 times, the second moment at 6 times the parameters' period (arXiv 2505.22549, App. I)."""
    first, second = MULTIPLE_OF_PARAMS["first"], MULTIPLE_OF_PARAMS["second"]
    times = {PARAMS: 1, SECOND_MOMENT: second}
    return {state: times.get(state, first) * params_period(periods) for state in periods}


def half_life_rule(config: Config) -> Periods | None:
    """Each momentum at its half-life, but not more often than the parameters (App. I); None where betas are not
    known."""
    if config.optimizer is None:
        return None
    own, least = config.optimizer.periods, params_period(config.optimizer.periods)
    return {PARAMS: least} | {
        state: max(least, half_life_period(beta))
        for state, beta in config.optimizer.after_switch.beta_of.items()
        if state in own
    }


def alternatives(config: Config) -> Mapping[str, Periods]:
    """Name -> periods, all with the parameters' period of ``config``; none that it has itself, and none twice."""
    own = periods_of(config)
    every = own[PARAMS]
    found: dict[str, Periods] = {}
    named: dict[str, Periods | None] = {
        "all on one period" if config.optimizer is None else LOCAL[config.optimizer.rule]: dict.fromkeys(own, every),
        "params only (DiLoCo)": {state: every if state == PARAMS else None for state in own},
        "3x / 6x": papers_default(own),
        "half-life rule": half_life_rule(config),
    }
    for name, periods in named.items():
        if periods is not None and periods not in [own, *found.values()]:
            found[name] = periods
    return found


def most_fragments(config: Config) -> int:
    """Into how many fragments the states of ``config`` could be cut, one for each step of the shortest period; 1 where
    it has fragments already, or cannot have them, or where nothing overlaps."""
    reset = config.optimizer is not None and config.optimizer.reset_momenta
    adapts = config.optimizer is not None and adaptive(config.optimizer.periods)
    last = config.deslo.state_dict == "last_average"
    if config.deslo.fragments > 1 or not config.deslo.overlap_comm or reset or adapts or last:
        return 1
    return min(filter(None, periods_of(config).values()))


def in_fragments(config: Config, count: int) -> Config:
    """The same job, its states in ``count`` fragments."""
    return replace(config, deslo=replace(config.deslo, fragments=count))


def in_few_bits(config: Config) -> Config:
    """The same job, its states as ``FEW_BITS``; itself where the config has chosen already what they travel as."""
    if config.deslo.wire != DesloConfig().wire:
        return config
    wire = settle_wire(Wire(of_all=FEW_BITS, difference=None, feedback=None), periods_of(config))
    return replace(config, deslo=replace(config.deslo, wire=wire))


def synchronous(config: Config, steps: int) -> Config:
    """The same job with gradients averaged at each of ``steps`` steps, and nothing else."""
    return replace(config, deslo=replace(config.deslo, synchronous_steps=steps))
