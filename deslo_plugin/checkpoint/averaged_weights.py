"""The average in the place of the replica's own weights for a while: to evaluate it, or to save it by whatever saves a
model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import BUFFERS, PARAMS
from deslo_plugin.attachment import attachments_of
from deslo_plugin.checkpoint.replica_mean import mean_of
from deslo_plugin.checkpoint.state_dict_guard import local_state_dict
from deslo_plugin.checkpoint.state_tree import adapter_of
from deslo_plugin.checkpoint.tensor_chunks import TensorChunks
from deslo_plugin.errors import ConfigError


@contextmanager
def averaged_weights(model: Any) -> Iterator[None]:
    """Inside, parameters and floating buffers of ``model`` are the mean over all replicas, afterwards its own again, to
    the bit.

        with deslo_plugin.averaged_weights(model):      # on every rank
            score = evaluate(model)

    ``state_dict()`` of the model, not of the optimizer, is allowed inside. Averages in flight land later as if nothing
    had been. Holds the own weights on the CPU meanwhile. Takes an attached model or an engine, like ``save``.

    Collective over all ranks at its beginning: never on one alone. Raises ``ConfigError`` for a model that nothing is
    attached to, and at its end if the optimizer has taken steps inside, which are undone.
    """
    attachments = attachments_of(model, "averaged_weights")
    averaging, adapter = attachments[0].averaging, adapter_of(model, attachments)
    tree = adapter.tree()
    weights, buffers = (
        [piece for name in sorted(tree) if name.startswith(f"{kind}/") for piece in _pieces(tree[name])]
        for kind in (PARAMS, BUFFERS)
    )
    with attachments[0].together("averaged_weights()"), torch.no_grad():
        means = [
            *averaging.means("averaged_weights", weights),
            *(mean_of(buffer, attachments[0].peers) for buffer in buffers),
        ]
    own = [piece.to("cpu", copy=True) for piece in (*weights, *buffers)]
    steps = averaging.steps
    try:
        _write([*weights, *buffers], means)
        del means
        adapter.publish()
        with local_state_dict("weights"):
            yield
    finally:
        _write([*weights, *buffers], own)
        adapter.publish()
    if averaging.steps != steps:
        raise ConfigError(
            "averaged_weights(model)",
            "no optimizer step inside",
            f"{averaging.steps - steps}",
            "leave it before the next step: what was trained inside is undone at its end",
        )


def _pieces(value: TensorChunks | Tensor) -> list[Tensor]:
    """What lies on this rank of a tensor that has a mean, complex ones as pairs of real numbers."""
    pieces = [piece for _, piece in value.pieces] if isinstance(value, TensorChunks) else [value]
    pieces = [torch.view_as_real(piece.detach()) if piece.is_complex() else piece.detach() for piece in pieces]
    return [piece for piece in pieces if piece.is_floating_point()]


@torch.no_grad()
def _write(pieces: list[Tensor], values: list[Tensor]) -> None:
    # what is put back was not written, for whoever looks
    with torch.autograd._unsafe_preserve_version_counter(tuple(pieces)):
        for piece, value in zip(pieces, values):
            piece.copy_(value)
