"""What a model's own ``state_dict()`` names, without what wrappers put into the names."""

from typing import Any

from torch import Tensor, nn

from deslo_plugin.algorithm.state_names import BUFFERS, PARAMS
from deslo_plugin.checkpoint.resharding import reshard
from deslo_plugin.checkpoint.state_dict_guard import local_state_dict
from deslo_plugin.checks.module_wrappers import bare

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def saved_state(model: nn.Module) -> dict[str, Any]:
    """Plain name -> what this replica's ``state_dict()`` holds under it, in its order: live parameters and buffers,
    those with several names under each of them, and what modules add to it. FSDP2 gives shards."""
    reshard(model)
    with local_state_dict():
        return {plain_name(name): value for name, value in bare(model).state_dict(keep_vars=True).items()}


def places(model: nn.Module) -> dict[str, str]:
    """Name in ``state_dict()`` of the plain model, in its order -> where in the tree the tensor is that it names."""
    params = {plain_name(name): param for name, param in bare(model).named_parameters()}
    named = {f"{BUFFERS}/{name}": buffer for name, buffer in saved_buffers(model).items()}
    named |= {f"{PARAMS}/{name}": param for name, param in params.items()}
    of_tensor = {id(tensor): place for place, tensor in named.items()}
    found = {}
    # a hook of the user's may have put a copy under the name of a parameter
    for name, value in saved_state(model).items():
        place = of_tensor.get(id(value)) or next(
            (f"{kind}/{name}" for kind in (PARAMS, BUFFERS) if f"{kind}/{name}" in named), None
        )
        if place is not None:
            found[name] = place
    return found


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Plain name, the first of several -> buffer, of those that belong to the model's state."""
    buffers = {id(buffer) for buffer in model.buffers()}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in saved_state(model).items():
        if id(value) in buffers:
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
