"""Where each ZeRO stage keeps the tensors that the optimizer steps, and how they get from there into the model."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor


def partitions(engine: DeepSpeedEngine) -> Iterator[list[Tensor]]:
    """For each param group, the tensors on this rank that the optimizer will step."""
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        if engine.zero_optimization_partition_weights():
            flat, of_group = engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.sub_group_to_group_id
            yield [tensor for sub_group, tensor in enumerate(flat) if of_group[sub_group] == index]
        else:
            yield group["params"]


def each_sub_group(engine: DeepSpeedEngine) -> Iterator[None]:
    """Shows the optimizer its parameters as the engine does in a step: ZeRO-3 one sub-group at a time, else all."""
    if not engine.zero_optimization_partition_weights():
        yield
        return
    for sub_group, tensor in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
        group = engine.basic_optimizer.param_groups[engine.optimizer.sub_group_to_group_id[sub_group]]
        group["params"] = [tensor]
        yield
        group["params"] = []


def gradients(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's reduced gradients as they wait for the step, before they are clipped."""
    wrapper = engine.optimizer
    if not engine.zero_optimization():
        return [param.grad for param in engine.module.parameters() if param.grad is not None]
    if hasattr(wrapper, "averaged_gradients"):
        return [tensor for of_group in wrapper.averaged_gradients.values() for tensor in of_group or ()]
    return wrapper.fp32_groups_gradients_flat  # BF16_Optimizer


@torch.no_grad()
def copy_masters_to_model(engine: DeepSpeedEngine) -> None:
    """Copies the stepped tensors into the model, as the engine does at the end of a step that it does not skip.
    Collective over the replica."""
    if engine.zero_optimization_partition_weights():
        for sub_group in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        for param in engine.module.parameters():
            param.ds_secondary_tensor = None  # of hpZ, made again of the first at the next forward
        _gather_again(engine)
    elif hasattr(engine.optimizer, "update_lp_params"):  # ZeRO-1 and -2
        engine.optimizer.update_lp_params()
    else:
        for param, master in low_precision_pairs(engine):
            param.copy_(master)


def _gather_again(engine: DeepSpeedEngine) -> None:
    """ZeRO-3: whole parameters that lie gathered on this rank are made of the partitions as they are now. Those are the
    small ones, which it never lets go, and what an evaluation, a prefetch or ``GatheredParameters`` has left."""
    params = [param for param in engine.module.parameters() if hasattr(param, "ds_status")]
    kept = {id(param) for param in engine.optimizer.persistent_parameters}
    gathered = [p for p in params if p.ds_status is ZeroParamStatus.AVAILABLE or id(p) in kept]
    if any(param.ds_status is ZeroParamStatus.INFLIGHT for param in params):
        engine.optimizer._partition_all_parameters()  # waits for what is under way
    if gathered:
        gathered[0].partition(gathered)
        gathered[0].all_gather(gathered)


def low_precision_pairs(engine: DeepSpeedEngine) -> Iterator[tuple[Tensor, Tensor]]:
    """ZeRO stage 0 in bf16: each model parameter with its float32 master; nothing in float32."""
    wrapper = engine.optimizer
    for params, masters in zip(getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", [])):
        yield from zip(params, masters)


def local_shard(param: Any) -> Tensor:
    """This rank's shard of a ZeRO-3 parameter, without the uninitialised padding of the last one."""
    shard = param.ds_tensor.data.view(-1)
    return shard[: _own_numel(param)]


@torch.no_grad()
def zero_padding(engine: DeepSpeedEngine) -> None:
    """Zeroes the padding of ZeRO-3's partitions, which it leaves uninitialised: NaN there would look like
    divergence."""
    if not engine.zero_optimization_partition_weights():
        return
    for params, flat in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_partitioned_groups_flat):
        for param, part in zip(params, flat.split([param.partition_numel() for param in params])):
            part[_own_numel(param) :].zero_()


def shard_start(param: Any) -> int:
    """Where this rank's shard begins in a ZeRO-3 parameter."""
    return dist.get_rank(param.ds_process_group) * param.partition_numel()


def _own_numel(param: Any) -> int:
    return min(param.partition_numel(), max(0, param.ds_numel - shard_start(param)))
