"""Whole matrices of the flat partitions that ZeRO-1 and -2 cut param groups into, for rules that need them."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.matrices import Whole


def whole_matrices(engine: DeepSpeedEngine, rule: str) -> Whole | None:
    """How an update by ``rule`` gets at whole matrices; None where it needs none, or is given them.

    Raises ``ConfigError`` where they cannot be had, on every rank alike."""

    def refuse(expected: str, got: str, do: str) -> NoReturn:
        raise ConfigError(f"optimizer.params.rule {rule}", expected, got, do)

    if RULES[rule].of_matrices and engine.mpu.get_model_parallel_world_size() > 1:
        refuse("whole matrices on each rank", "matrices that tensor_parallel.autotp_size cuts", "set it to 1")
    if not RULES[rule].of_matrices or not engine.zero_optimization():
        return None
    if engine.zero_optimization_partition_weights():
        refuse(
            "ZeRO stage 0, 1 or 2",
            "stage 3, whose sub-groups cut matrices and are stepped one by one",
            "take stage 2, or FSDP2",
        )
    if getattr(engine.optimizer, "cpu_offload", False):
        refuse("an optimizer on the device of the model, for products of matrices", "offload_optimizer", "remove it")
    if not hasattr(engine.optimizer, "round_robin_bit16_groups"):
        kind = type(engine.optimizer).__name__
        refuse("the optimizer of ZeRO-1 or -2", kind, "set zero_optimization.stage to 0 or 2")
    return lambda params, parts, make: [_own_part(engine.optimizer, p, part, make) for p, part in zip(params, parts)]


def _own_part(zero: Any, partition: Tensor, part: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """This rank's partition of what ``make`` gives for each matrix of a param group. A rank makes those that its
    partition begins, ends or is in: nearly every matrix is made once in a replica. Collective over the replica."""
    index = next(i for i, each in enumerate(zero.single_partition_of_fp32_groups) if each is partition)
    group = zero.real_dp_process_group[index]
    flat = part.new_empty(part.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(flat, part.contiguous(), group=group)
    start, made = dist.get_rank(group) * part.numel(), torch.zeros_like(part)
    params = zero.round_robin_bit16_groups[index]
    padding = getattr(zero, "round_robin_bit16_padding", {index: [0] * len(params)})[index]
    ends = accumulate(param.numel() + pad for param, pad in zip(params, padding))
    for param, end, pad in zip(params, ends, padding):
        begins, ends_at = end - pad - param.numel(), end - pad
        low, high = max(begins, start), min(ends_at, start + part.numel())
        if low < high:
            matrix = make(flat[begins:ends_at].view(param.shape))
            made[low - start : high - start] = matrix.reshape(-1)[low - begins : high - begins]
    return made
