"""How operators refuse their arguments: errors that name the argument, as csrc/torch/argument_checks.h words them."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor


def refuse(message: str) -> None:
    raise ValueError(f"deslo: {message}")


def refuse_overlap(lists: Mapping[str, Sequence[Tensor]], *, written: Collection[str]) -> None:
    """Refuses tensors that share memory with one that is written. ``lists`` runs over arguments by name; all are
    dense."""
    ranges = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, f"{name}[{index}]", name in written)
        for name, tensors in lists.items()
        for index, tensor in enumerate(tensors)
        if tensor.numel()
    )
    last, last_written = (0, 0, "", True), (0, 0, "", True)  # those so far that end last
    for each in ranges:
        other = last if each[3] else last_written
        if other[1] > each[0]:
            refuse(f"{each[2]}: expected memory of its own, but it overlaps {other[2]}")
        last = max(last, each, key=lambda s: s[1])
        last_written = max(last_written, each, key=lambda s: s[1]) if each[3] else last_written
