"""All replicas made one, at once: every state, whatever is due."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import BUFFERS, PARAMS
from deslo_plugin.attachment import Attachment, attachments_of, on_every_rank
from deslo_plugin.checkpoint.replica_mean import mean_of
from deslo_plugin.checkpoint.state_tree import adapter_of
from deslo_plugin.checkpoint.tensor_chunks import TensorChunks
from deslo_plugin.checkpoint.tree_agreement import Tree, united, unlike
from deslo_plugin.comm.all_or_none import all_or_none


@on_every_rank
@torch.no_grad()
def sync_replicas(model: Any) -> None:
    """Averages parameters, states and buffers of all replicas in place, whatever is due: they are equal then.
    Collective.

    Takes an attached model or an engine, like ``save``.
    """
    attachments = attachments_of(model, "sync_replicas")
    adapter = adapter_of(model, attachments)
    tree = all_or_none(adapter.tree, attachments[0].groups.world)
    scheduled = scheduled_states(attachments)
    more = unlike(tree, scheduled, attachments[0].groups.replica)
    if more:
        adapter.prepare(united(adapter.states, attachments[0].groups.world))
        tree = adapter.tree() | {name: value for name, value in more.items() if name.split("/", 1)[0] not in scheduled}
    means = means_of(tree, attachments)
    for name, mean in means.items():
        for piece, new in zip(floating_pieces(tree[name]), floating_pieces(mean)):
            piece.copy_(new)
    adapter.put(tree)
    for each in attachments:
        each.averaging.abandon()
        each.averaging.mark_synchronized()


def means_of(tree: Tree, attachments: Sequence[Attachment]) -> Tree:
    """Of all floating tensors but clocks and counters, state by state; those are alike on all replicas."""
    means: Tree = {}
    scheduled = {PARAMS} | scheduled_states(attachments)
    for state, names in groupby(sorted(tree), key=lambda name: name.split("/", 1)[0]):
        if state == BUFFERS:  # the ranks of one replica have their own as well
            means |= {
                name: mean_of(tree[name], attachments[0].peers, tree[name].dtype)
                for name in names
                if tree[name].is_floating_point() or tree[name].is_complex()
            }
            continue
        named = {
            name: pieces for name in names if (pieces := floating_pieces(tree[name], 0 if state in scheduled else 1))
        }
        flat = iter(
            attachments[0].averaging.means("checkpoint", [piece for pieces in named.values() for piece in pieces])
        )
        for name, pieces in named.items():
            own = [next(flat).to("cpu", piece.dtype) for piece in pieces]
            means[name] = tree[name].like(own) if isinstance(tree[name], TensorChunks) else own[0]
    return means


def scheduled_states(attachments: Sequence[Attachment]) -> set[str]:
    return {state for each in attachments for group in each.averaging.groups for state in group["sync_every"]}


def floating_pieces(value: Any, ndim: int = 0) -> list[Tensor]:
    """This rank's floating parts of ``value``, of ``ndim`` dimensions or more."""
    pieces = [piece for _, piece in value.pieces] if isinstance(value, TensorChunks) else [value]
    return [piece for piece in pieces if isinstance(piece, Tensor) and piece.is_floating_point() and piece.ndim >= ndim]
