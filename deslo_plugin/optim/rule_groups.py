"""Which parameters of a param group have which rule, where a config has one of matrices and one beside it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.config.reader import did_you_mean, repr_with_type
from deslo_plugin.config.schema import OptimizerConfig
from deslo_plugin.errors import ConfigError


def groups_by_rule(param_group: Mapping[str, Any], optimizer: OptimizerConfig, where: str) -> Iterator[dict[str, Any]]:
    """``param_group`` as param groups of one rule each, which says so under ``rule``: that of matrices has what has two
    dimensions, unless the group names a rule itself.

    Raises ``ConfigError`` for a rule that the config does not have, and for one of matrices that is to have others."""
    refuse_numbers_of_its_own(param_group, optimizer, where)
    rules, named = optimizer.by_rule, param_group.get("rule")
    if named is not None and named not in rules:
        raise ConfigError(
            f"{where}.rule",
            " or ".join(rules),
            repr_with_type(named),
            did_you_mean(str(named), rules) or "remove it: a config has one rule, or one of matrices and one beside it",
        )
    if len(rules) == 1:
        yield {**param_group, "rule": optimizer.rule}
        return
    params = _listed(param_group)
    named = named if params else optimizer.rule
    if named == optimizer.rule:
        for index, param in enumerate(params):
            if not is_matrix(param):
                shape = list(_tensor(param).shape)
                raise ConfigError(
                    f"{where}, parameter {index}",
                    f'a matrix, for "rule": "{named}"',
                    f"one of shape {shape}",
                    f'leave it out: its group has "rule": "{list(rules)[-1]}", or none',
                )
    for rule, config in rules.items():
        own = params if named else [each for each in params if is_matrix(each) == RULES[rule].of_matrices]
        if named == rule or (named is None and own):
            rates = {"lr": config.lr, "weight_decay": config.weight_decay} if config is not optimizer else {}
            yield {**rates, **param_group, "params": own, "rule": rule}


OF_ALL = (
    *("betas", "eps", "momenta", "second_moment", "bias_correction", "clip_value", "state_dtype", "reset_momenta"),
    *("outer_optimizer", "nesterov", "ns_steps", "momentum", "dampening", "amsgrad", "maximize"),
)
"""Numbers of an update that a param group of this or of torch's optimizers may name, and that are one for all here."""


def refuse_numbers_of_its_own(param_group: Mapping[str, Any], optimizer: OptimizerConfig, where: str) -> None:
    """Raises ``ConfigError`` for numbers that differ from the config's: without a word the config's would count."""
    for key in OF_ALL:
        given = param_group.get(key)
        given = tuple(given) if isinstance(given, list) else given
        if given and all(given != _number(key, rule) for rule in optimizer.by_rule.values()):
            raise ConfigError(
                f"{where}.{key}",
                "none: the update's numbers are one for all parameters, and stand in the config",
                repr_with_type(given),
                "remove it, or give these parameters an optimizer of their own; a group has lr, weight_decay, "
                "sync_every and rule",
            )


def _number(key: str, rule: OptimizerConfig) -> Any:
    """What the config says of ``key``, in the form of a param group of torch."""
    if key == "betas":
        return (*rule.betas, *(() if rule.beta2 is None else (rule.beta2,)))
    return rule.betas[0] if key == "momentum" else getattr(rule, key, None)


def rule_named(groups: Iterable[Mapping[str, Any]], param: Tensor) -> str:
    """The rule of ``param``; of one that no group shows, as between the steps of ZeRO-3, that of the first."""
    groups = list(groups)
    own = (group["rule"] for group in groups if any(param is each for each in group["params"]))
    return next(own, groups[0]["rule"])


def is_matrix(param: Any) -> bool:
    """Whether a parameter, or its name and it, has two dimensions; ZeRO-3 keeps the shape of one that it has taken."""
    return len(getattr(_tensor(param), "ds_shape", _tensor(param).shape)) == 2


def refuse_parts(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises ``ConfigError`` where an optimizer of matrices steps parts of them that cannot be made whole."""
    for group in groups:
        for param in group["params"] if RULES[group["rule"]].of_matrices else ():
            cut = {type(each).__name__ for each in getattr(param, "placements", ())} - {"Shard", "Replicate"}
            if param.ndim != 2 or cut:
                flat = f"a flat part of shape {list(param.shape)}, which mixes or cuts them"
                raise ConfigError(
                    f"optimizer.params.rule {group['rule']}",
                    "whole matrices, or DTensors of them that each dimension of a mesh shards in order",
                    f"one with {', '.join(cut)}, cut twice along one dimension" if cut else flat,
                    "shard on one dimension of the mesh, take DDP, FSDP2 or ZeRO stage 0 to 2, or another rule",
                )


def _listed(param_group: Mapping[str, Any]) -> list[Any]:
    params = param_group["params"]
    return [params] if isinstance(params, Tensor) else list(params)


def _tensor(param: Any) -> Tensor:
    return param[1] if isinstance(param, tuple) else param
