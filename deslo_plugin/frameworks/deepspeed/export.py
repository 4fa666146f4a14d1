"""One model out of many replicas."""

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from deslo_plugin.frameworks.deepspeed.zero import low_precision_pairs


@torch.no_grad()
def averaged_state_dict(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The model's state dict with the mean of all replicas' parameters, float32 on the CPU; training is not touched.

    Of an engine without replicas it is the one model.

    Collective over all ranks; needs room for one parameter more on each device. Buffers are those of this rank.
    """
    stage_0 = {} if engine.zero_optimization() else {id(param): master for param, master in low_precision_pairs(engine)}
    saved = engine.module.state_dict().keys()
    state = {name: buffer.detach().cpu() for name, buffer in engine.module.named_buffers() if name in saved}
    for name, param in engine.module.named_parameters():
        full = safe_get_full_fp32_param(param) if engine.zero_optimization() else None
        full = stage_0.get(id(param), param) if full is None else full
        full = full.detach().to(engine.device, torch.float32, copy=True)
        dist.all_reduce(full, op=dist.ReduceOp.AVG)  # the ranks of a replica hold the same: this is the replicas' mean
        state[name] = full.cpu()
    return state
