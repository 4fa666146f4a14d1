"""The whole parameters of this rank's replica, out of whatever ZeRO made of them."""

from collections.abc import Iterator

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from deslo_plugin.frameworks.deepspeed.zero import low_precision_pairs


def full_params(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 master of every parameter, on the engine's device. Collective over the replica."""
    stage_0 = {} if engine.zero_optimization() else {id(param): master for param, master in low_precision_pairs(engine)}
    for name, param in engine.module.named_parameters():
        full = safe_get_full_fp32_param(param) if engine.zero_optimization() else None
        full = stage_0.get(id(param), param) if full is None else full
        yield name, full.detach().to(engine.device, torch.float32)
