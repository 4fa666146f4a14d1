"""How operators refuse their arguments: errors that name the argument, as csrc/torch/argument_checks.h words them."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor


def refuse(message: str) -> None:
    raise ValueError(f"deslo: {message}")


def refuse_overlap(lists: Mapping[str, Sequence[Tensor]], *, written: Collection[str]) -> None:
    """Refuses tensors that share memory with one that is written. ``lists`` runs over arguments by name; all are
    dense."""
    stretches = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, f"{name}[{index}]", name in written)
        for name, tensors in lists.items()
        for index, tensor in enumerate(tensors)
        if tensor.numel()
    )
    reaching, writing = (0, 0, "", True), (0, 0, "", True)  # those so far that end last
    for stretch in stretches:
        other = reaching if stretch[3] else writing
        if other[1] > stretch[0]:
            refuse(f"{stretch[2]}: expected memory of its own, but it overlaps {other[2]}")
        reaching = max(reaching, stretch, key=lambda s: s[1])
        writing = max(writing, stretch, key=lambda s: s[1]) if stretch[3] else writing
