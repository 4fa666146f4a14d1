"""Which parameters have no average, or no update: refused by name when they are attached, alike on every rank."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.local_tensors import local
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
                "keep it as real numbers, nn.Parameter(torch.view_as_real(values)), and use torch.view_as_complex of "
                "it in forward",
            )
    for name, module in model.named_modules() if isinstance(optimizer, DesLoc) else ():
        if getattr(module, "sparse", False) is True and getattr(module, "weight", None) in own:
            raise ConfigError(
                f"module {name}",
                f"{type(module).__name__}(sparse=False) with DesLoc, which updates every row",
                "sparse=True",
                "change it, or attach torch.optim.SparseAdam for it and DesLoc for the others",
            )


def refuse_nonfinite(trained: Mapping[str, Tensor]) -> None:
    """Raises ``ConfigError`` for a parameter whose part on this rank has NaN or inf before the first step: a lower rate
    would not help."""
    for name, param in trained.items():
        if not bool(torch.isfinite(local([param.detach()])[0]).all()):
            raise ConfigError(
                f"parameter {name}",
                "finite numbers before the first step",
                "NaN or inf",
                "initialise it: a model from the meta device is empty until each of its modules has reset_parameters()",
            )
