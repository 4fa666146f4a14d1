"""Any optimizer's ``step()`` as a step of Algorithm 1, and what of it cannot be one."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch

from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.step_checks import refuse_capture


def schedule(averaging: AnyOptimizerAverager) -> None:
    """From now on every ``optimizer.step()`` is a step of Algorithm 1, and loads and new param groups are taken in.
    Wraps ``step`` and ``add_param_group`` of the instance."""
    optimizer = averaging.optimizer
    inner, scales = _taken_through_ours(optimizer), getattr(optimizer, "_step_supports_amp_scaling", False)
    # torch's own call the closure once, before the update; others may call it where they like, so they get it
    # themselves
    asks_first = type(optimizer).__module__.startswith("torch.optim.")

    @functools.wraps(inner)
    @torch.no_grad()
    def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        refuse_capture(optimizer)
        if closure is None and _only_creates_states(optimizer):
            with averaging.watch.looking_away() if averaging.watch else contextlib.nullcontext():
                return inner()
        result = None
        if closure is not None and (asks_first or averaging.gradients.skips_nonfinite):
            with torch.enable_grad():
                result, closure = closure(), None

        cohorts = averaging.before_update()
        if cohorts is not None:
            skip = averaging.gradients.vote_to_skip()
            if not skip:
                with contextlib.nullcontext() if scales else _unscaled(averaging):
                    if closure is None:
                        inner()
                    else:
                        result = inner(closure)
            averaging.learn_states(not skip)
            averaging.after_update(cohorts)
        return result

    add = optimizer.add_param_group

    @functools.wraps(add)
    def add_param_group(_: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
        add(param_group)
        averaging.take_in()
        if averaging.transport.progress:
            shapes = [tuple(param.shape) for param in averaging.groups[-1]["params"]]
            averaging.transport.progress.change(
                "optimizer.add_param_group", f"parameters of {shapes}", averaging.deslo.timeout_s
            )

    # a method still: torch's lr schedulers ask for its __func__
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    optimizer.add_param_group = MethodType(add_param_group, optimizer)  # type: ignore[method-assign]
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: averaging.loading(state_dict))
    optimizer.register_load_state_dict_post_hook(lambda _: averaging.loaded())
    # GradScaler: call ``step`` always, so that every replica's clock ticks
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]


def _taken_through_ours(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """The ``step`` of now, for the one that replaces it. Whoever kept it and calls it himself gets a ``ConfigError``
    instead of an update that nobody counts."""
    inner, ours = optimizer.step, [False]

    def expect_ours(*_: Any) -> None:
        if not ours[0]:
            raise ConfigError(
                f"{type(optimizer).__name__}.step",
                "the step that attach has installed",
                "the one before it, which a wrapper of the optimizer has kept",
                "give attach that wrapper, or call it before the wrapper is made",
            )

    @functools.wraps(inner)
    def step(*args: Any) -> Any:
        ours[0] = True
        try:
            return inner(*args)
        finally:
            ours[0] = False

    optimizer.register_step_pre_hook(expect_ours)
    return step


def _only_creates_states(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is no step of training: torch.distributed.checkpoint steps a fresh optimizer with lr 0 and gradients
    of zero, so that there are states to load into."""
    if optimizer.state or any(float(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    gradients = [param.grad for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    return None not in gradients and not any(bool(each.any()) for each in local(gradients))


@contextlib.contextmanager
def _unscaled(averaging: AnyOptimizerAverager) -> Iterator[None]:
    """What a GradScaler has left on an optimizer that knows nothing of it, out of its sight; gradients divided by the
    scale."""
    left = {
        name: vars(averaging.optimizer).pop(name)
        for name in ("grad_scale", "found_inf")
        if hasattr(averaging.optimizer, name)
    }
    if left.get("grad_scale") is not None:
        torch._foreach_div_(averaging.gradients.local(), left["grad_scale"])
    try:
        yield
    finally:
        vars(averaging.optimizer).update(left)
