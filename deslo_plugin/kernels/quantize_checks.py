"""What the operators of ``quantize`` refuse, in the words of csrc/torch/quantize_checks.h."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deslo_plugin.kernels.argument_checks import refuse

HALVES = (torch.bfloat16, torch.float16)


def check_lists(name: str, tensors: Sequence[Tensor], *, written: bool = False, **others: Sequence[Tensor]) -> None:
    """``tensors``, called ``name``, may be of 16-bit formats if they are not ``written``; ``others`` are float32 of
    their shapes, or empty."""
    if not tensors:
        refuse(f"{name}: expected one tensor or more, got an empty list")
    for i, tensor in enumerate(tensors):
        _check_place(f"{name}[{i}]", tensor, f"{name}[0]", tensors[0])
        if tensor.dtype != torch.float32 and (written or tensor.dtype not in HALVES):
            refuse(f"{name}[{i}]: expected float32{'' if written else ', bfloat16 or float16'}, got another dtype")
    for other, each in others.items():
        if each and len(each) != len(tensors):
            refuse(f"{other}: expected {len(tensors)} tensors or none, got {len(each)}")
        for i, tensor in enumerate(each):
            _check_place(f"{other}[{i}]", tensor, f"{name}[0]", tensors[0])
            if tensor.dtype != torch.float32:
                refuse(f"{other}[{i}]: expected float32, got another dtype")
            if tensor.shape != tensors[i].shape:
                refuse(
                    f"{other}[{i}]: expected shape {list(tensors[i].shape)} of {name}[{i}], got {list(tensor.shape)}"
                )


def check_buffer(
    name: str, tensor: Tensor, dtype: torch.dtype, like_name: str, like: Tensor, fits: bool, shape: str
) -> None:
    """A tensor that is no list's; ``shape`` says which would fit."""
    _check_place(name, tensor, like_name, like)
    other = tensor.dtype != dtype
    if other or not fits:
        refuse(
            f"{name}: expected {str(dtype).removeprefix('torch.')} of shape {shape}, got "
            f"{'another dtype of shape' if other else 'shape'} {list(tensor.shape)}"
        )


def check_records(records: Tensor, need: int, record_bytes: int, like_name: str, like: Tensor) -> None:
    fits = records.dim() == 2 and len(records) >= need and records.shape[1] == record_bytes
    check_buffer("records", records, torch.uint8, like_name, like, fits, f"[{need} or more, {record_bytes}]")


def check_rank(rank: int, replicas: int) -> None:
    if not 0 <= rank < replicas:
        refuse(f"rank: expected one of {replicas} replicas from 0 on, got {rank}")


def _check_place(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        refuse(f"{name}: expected the device of {like_name}, got another")
    if not tensor.is_contiguous():
        refuse(f"{name}: expected a contiguous tensor")
