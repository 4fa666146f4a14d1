"""``optimizer.params``: the rule and its numbers, and with a rule of matrices those of the rule beside it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from deslo_plugin.algorithm.orthogonal import ADJUST_LR, NS_DTYPES, Orthogonal
from deslo_plugin.algorithm.rules import RULES, Rule
from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.config.periods import Momenta, read_momenta, read_periods
from deslo_plugin.config.reader import Reader, repr_with_type
from deslo_plugin.config.schema import STATE_DTYPES, OptimizerConfig, Outer
from deslo_plugin.config.switch import read_switch
from deslo_plugin.errors import ConfigError

RENAMED_PARAMS = {"outer": "outer_optimizer", "clip": "clip_value, a number"}
OF_MATRICES = ("nesterov", "ns_steps", "ns_dtype", "adjust_lr_fn", "beside")
FOR_ALL = ("clip_value", "reset_momenta", "outer_optimizer", "state_dtype")  # whatever a parameter's rule is


def read_optimizer(params: Any) -> OptimizerConfig:
    """``optimizer.params`` -> ``OptimizerConfig``."""
    reader = Reader("optimizer.params", params, renamed=RENAMED_PARAMS)
    config = replace(
        _read_rule(reader, RULES),
        clip_value=reader.number("clip_value", above=0.0) if "clip_value" in reader else None,
        reset_momenta=reader.boolean("reset_momenta", False),
        outer_optimizer=_outer(reader),
        state_dtype=reader.choice("state_dtype", "float32", STATE_DTYPES),
    )
    beside = reader.pop("beside") if RULES[config.rule].of_matrices else None
    reader.finish()
    if RULES[config.rule].of_matrices:
        config = replace(config, beside=_beside({} if beside is None else beside, config))
    for each in config.by_rule.values():
        averaged, of = [state for state in each.moments if each.periods[state]], "" if each is config else " of beside"
        if config.reset_momenta and averaged:
            raise ConfigError(
                "optimizer.params.reset_momenta",
                f"every momentum's sync_every to be null (here {', '.join(averaged)}{of} is averaged)",
                "true",
                "set those periods to null, or drop reset_momenta: resetting at each average of params undoes theirs",
            )
    return config


def _read_rule(reader: Reader, rules: Iterable[str]) -> OptimizerConfig:
    """What ``reader`` says of one rule, one of ``rules``; without what is of all, which has its defaults."""
    name = reader.choice("rule", "adam", rules)
    rule = RULES[name]
    for key in [key for key in ("eps", "second_moment") if key in reader and not rule.has_second_moment]:
        got, do = repr(reader.peek(key)), f"remove it: {name} has no second moment"
        reader.refuse(key, f"no such key for rule {name}", got, do)
    if "bias_correction" in reader and not rule.corrects_bias:
        reader.refuse(
            "bias_correction", f"no such key for rule {name}", repr(reader.peek("bias_correction")), "remove it"
        )
    for key in [key for key in OF_MATRICES if key in reader and not rule.of_matrices]:
        matrices = " or ".join(each for each, one in RULES.items() if one.of_matrices)
        do = f'take "rule": "{matrices}", whose key it is, or remove it'
        reader.refuse(key, f"no such key for rule {name}", repr_with_type(reader.peek(key)), do)

    weighed = reader.peek("momenta")
    momenta = read_momenta(reader, adaptive=rule.has_second_moment, beta=rule.beta)
    if rule.of_matrices:
        momenta = _with_nesterov(reader, momenta, weighed)
    switch = read_switch(reader, momenta)
    # a half-life is that of the betas for which periods matter
    periods, sources = read_periods(reader, replace(momenta, betas=switch.betas) if switch else momenta)
    return OptimizerConfig(
        rule=name,
        lr=reader.number("lr", 1e-3),
        betas=momenta.betas,
        weights=momenta.weights,
        beta2=momenta.beta2,
        eps=reader.number("eps", rule.eps) if rule.has_second_moment else None,
        weight_decay=reader.number("weight_decay", 0.0),
        bias_correction=reader.boolean("bias_correction", rule.corrects_bias),
        clip_value=None,
        periods=periods,
        period_sources=sources,
        reset_momenta=False,
        outer_optimizer=None,
        state_dtype="float32",
        switch=switch,
        orthogonal=_orthogonal(reader, rule),
    )


def _with_nesterov(reader: Reader, momenta: Momenta, written: Any) -> Momenta:
    """Nesterov's momentum is the quasi-hyperbolic weight beta: ``nesterov`` sets it where no weight is written."""
    if any("weight" in entry for entry in written or ()):
        if "nesterov" in reader:
            reader.refuse(
                "nesterov",
                "none beside a momentum that has its weight",
                repr_with_type(reader.peek("nesterov")),
                "remove one of the two: nesterov is the weight beta, and without it the weight is 1",
            )
        return momenta
    return replace(momenta, weights=momenta.betas) if reader.boolean("nesterov", True) else momenta


def _orthogonal(reader: Reader, rule: Rule) -> Orthogonal | None:
    if not rule.of_matrices:
        return None
    return Orthogonal(
        ns_steps=reader.positive_int("ns_steps", 5),
        ns_dtype=reader.choice("ns_dtype", "bfloat16", NS_DTYPES),
        adjust_lr_fn=reader.choice("adjust_lr_fn", "match_rms_adamw", ADJUST_LR),
    )


def _beside(block: Any, main: OptimizerConfig) -> OptimizerConfig:
    """What is computed of parameters that are no matrices; rate, decay and the period of parameters are those of
    ``main`` where ``block`` says nothing."""
    reader = Reader("optimizer.params.beside", block, renamed=RENAMED_PARAMS)
    for key in (key for key in FOR_ALL if key in reader):
        reader.refuse(key, "none: it is for all parameters", repr(reader.peek(key)), "write it into optimizer.params")
    every = {PARAMS: main.periods[PARAMS]}
    inherited = {"lr": main.lr, "weight_decay": main.weight_decay, "sync_every": every} | dict(block)
    if isinstance(block.get("sync_every"), Mapping):
        inherited["sync_every"] = every | dict(block["sync_every"])
    given = Reader(reader.where, inherited)
    config = _read_rule(given, [name for name, rule in RULES.items() if not rule.of_matrices])
    given.finish()
    if config.switch is not None and (main.switch is None or config.switch.at):
        key, do = ("switch", "give the matrices one too") if main.switch is None else ("switch.at", "remove it")
        reader.refuse(key, "the step of optimizer.params.switch, one for all", "another", do)
    shared = {key: getattr(main, key) for key in FOR_ALL}
    return replace(config, **shared)


def _outer(reader: Reader) -> Outer | None:
    block = reader.pop("outer_optimizer")
    if block is None:
        return None
    outer = Reader(f"{reader.where}.outer_optimizer", block)
    given, lr = "lr" in outer, outer.number("lr", 0.0)
    config = Outer(lr=lr if given else None, momentum=outer.number("momentum", 0.9, below=1.0))
    outer.finish()
    return config
