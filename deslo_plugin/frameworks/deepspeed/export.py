"""The whole parameters of this rank's replica, out of whatever ZeRO made of them."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from deslo_plugin.checkpoint.export import Parts, parts_of
from deslo_plugin.frameworks.deepspeed.mpu import ReplicaMPU
from deslo_plugin.frameworks.deepspeed.tensor_parts import part_of
from deslo_plugin.frameworks.deepspeed.zero import low_precision_pairs


def whole_of(engine: DeepSpeedEngine) -> Callable[[Tensor], Tensor]:
    """From a parameter to its whole master, float32 or wider, on the engine's device, which is collective over the
    replica; other tensors stay as they are."""
    unit = engine.mpu
    tensor = unit.tensor if isinstance(unit, ReplicaMPU) else None
    stage_0 = {} if engine.zero_optimization() else {id(param): master for param, master in low_precision_pairs(engine)}

    def whole(param: Tensor) -> Tensor:
        if not isinstance(param, nn.Parameter):
            return param
        full = safe_get_full_fp32_param(param) if engine.zero_optimization() else None
        full = stage_0.get(id(param), param) if full is None else full
        full = full.detach().to(engine.device, torch.promote_types(full.dtype, torch.float32))
        return full if tensor is None else part_of(param, tensor.rank()).whole(full, tensor)

    return whole


def full_params(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 master of every parameter, on the engine's device. Collective over the replica."""
    whole = whole_of(engine)
    for name, param in engine.module.named_parameters():
        yield name, whole(param)


@parts_of.register
def engine_parts(engine: DeepSpeedEngine) -> Parts:
    """Of any engine: one without replicas has one model."""
    return engine.module, whole_of(engine), dist.group.WORLD, getattr(engine, "deslo", None)
