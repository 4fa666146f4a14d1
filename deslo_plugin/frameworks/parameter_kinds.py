"""Which parameters have no average, or no update: refused by name when they are attached, alike on every rank."""

import torch
from torch import nn

from deslo_plugin.errors import ConfigError
from deslo_plugin.optim.desloc import DesLoc


def refuse_kinds(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises ``ConfigError`` for complex parameters, and beside ``DesLoc`` for modules with sparse gradients."""
    own = {param for group in optimizer.param_groups for param in group["params"]}
    for name, param in model.named_parameters():
        if param in own and param.is_complex():
            raise ConfigError(
                f"parameter {name}",
                "real numbers",
                str(param.dtype).removeprefix("torch."),
                "keep it as real "
                "numbers, nn.Parameter(torch.view_as_real(values)), and use torch.view_as_complex of it in forward",
            )
    for name, module in model.named_modules() if isinstance(optimizer, DesLoc) else ():
        if getattr(module, "sparse", False) is True and getattr(module, "weight", None) in own:
            raise ConfigError(
                f"module {name}",
                f"{type(module).__name__}(sparse=False) with DesLoc, which updates every row",
                "sparse=True",
                "change it, or attach torch.optim.SparseAdam for it and DesLoc for the others",
            )
