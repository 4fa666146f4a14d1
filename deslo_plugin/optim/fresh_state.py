"""What ``DesLoc`` keeps of a parameter that has had no update yet."""

from collections.abc import Iterable

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import ORIGIN, OUTER_MOMENTUM, OUTER_PARAMS, STEP
from deslo_plugin.config.schema import OptimizerConfig
from deslo_plugin.config.wire import Wire
from deslo_plugin.errors import ConfigError


def fresh_state(
    param: Tensor, optimizer: OptimizerConfig, wire: Wire, counters: Iterable[str], clock: int
) -> dict[str, Tensor]:
    """The momenta of its rule, 0 in the shape of ``param``, in float32 (float64 for float64 parameters) or
    ``state_dtype``, and ``counters`` at step ``clock``. Raises ``ConfigError`` for dtypes that do not go together."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    if dtype == torch.float64 and wire.of_all != "float64":
        raise ConfigError(
            "deslo.wire_dtype",
            "'float64' for float64 parameters",
            repr(wire.of_all),
            "set it: float32 averages would round their states",
        )
    if dtype == torch.float64 and optimizer.state_dtype == "bfloat16":
        raise ConfigError(
            "optimizer.params.state_dtype",
            "'float32' with float64 parameters",
            "'bfloat16'",
            "remove it: float64 parameters have float64 momenta",
        )
    moment_dtype = torch.bfloat16 if optimizer.state_dtype == "bfloat16" else dtype
    state = {
        counter: torch.tensor(clock if counter in (STEP, ORIGIN) else 0, dtype=torch.int64, device="cpu")
        for counter in counters
    }
    for moment in optimizer.moments:
        state[moment] = torch.zeros_like(param, dtype=moment_dtype, memory_format=torch.preserve_format)
    if optimizer.outer_optimizer:
        state[OUTER_PARAMS] = param.detach().to(dtype, copy=True)
        state[OUTER_MOMENTUM] = torch.zeros_like(state[OUTER_PARAMS])
    return state
