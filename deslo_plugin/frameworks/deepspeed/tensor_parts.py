"""Which part of a whole parameter lies on this rank? All of it, or what AutoTP has cut for it."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from deslo_plugin.checkpoint.tensor_chunks import TensorChunks
from deslo_plugin.errors import ConfigError

CUT = "ds_autotp_universal_checkpoint_meta"  # where AutoTP says of a parameter how it has cut it


class Part(NamedTuple):
    """A box of a parameter of ``shape`` that begins at ``offset``."""

    shape: torch.Size
    offset: tuple[int, ...]

    def of(self, own: TensorChunks) -> TensorChunks:
        """``own`` pieces of the part, as pieces of the whole."""
        pieces = ((tuple(map(sum, zip(at, self.offset))), piece) for at, piece in own.pieces)
        return TensorChunks(self.shape, tuple(pieces))

    def whole(self, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The whole parameter, out of what the ranks of ``group`` have of it. Collective over it."""
        if own.shape == self.shape:
            return own
        whole = own.new_zeros(self.shape)
        whole[tuple(slice(at, at + size) for at, size in zip(self.offset, own.shape))] = own
        dist.all_reduce(whole, group=group)
        return whole


def shape_here(param: Any) -> torch.Size:
    """Of what this rank has of a parameter, before ZeRO partitions it."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def part_of(param: Any, rank: int) -> Part:
    """Of the ``rank`` among those that share ``param``."""
    shape, cut = shape_here(param), getattr(param, CUT, None)
    offset = [0 for _ in shape]
    if cut is None or cut["partition_dim"] is None:
        return Part(shape, tuple(offset))
    offset[cut["partition_dim"]] = sum(cut["partition_sizes"][:rank])
    return Part(torch.Size(cut["logical_shape"]), tuple(offset))


def refuse_unknown_cuts(engine: DeepSpeedEngine) -> None:
    """Raises ``ConfigError`` for matrices of which no rank can say what part it has: they could not be saved."""
    for name, param in engine.module.named_parameters():
        cut = getattr(param, CUT, None)
        if cut is None:
            known = not getattr(param, "tensor_model_parallel", False)
        else:
            replicated = cut["replicated"] or cut["partition_dim"] is None
            known = replicated or (cut["partition_sizes"] and not cut["sub_param_shape"])
        if not known:
            raise ConfigError(
                f"tensor_parallel, parameter {name}",
                "a matrix cut into one block of rows or columns for each rank",
                "several matrices in one, cut one by one" if cut else "a layer that AutoTP does not describe",
                "cut its layer in the model (q_proj, k_proj, v_proj), or skip it in tensor_parallel.partition_config",
            )
