"""Checkpoints that tell the truth about replicas: one averaged model, or every replica's own state.

A checkpoint is a folder: ``torch.distributed.checkpoint`` files and ``deslo.json``, which says what they are and proves that
they are whole. It appears under its name only when it is complete.

    average   one consistent model: parameters, momenta and buffers are averaged into the checkpoint; the replicas go on as
              they are. Loads on any number of replicas and shards, in every framework.
    sync      the replicas average in place first, and go on from there.
    exact     every replica's own state, and every rank's random numbers: resumes to the last bit, in the middle of any
              period, on the same replicas and shards.
"""

import pickle
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deslo_plugin.frameworks.attachment import Attachment, attached
from deslo_plugin.frameworks.proof import Proof, prove, read_proof, write_proof
from deslo_plugin.frameworks.state_tree import KEPT, Tree, holder_of, refuse_others
from deslo_plugin.log import say
from deslo_plugin.shards import local
from deslo_plugin.strict import ConfigError

MODES = ("average", "exact", "sync")


@torch.no_grad()
def save(path: str | Path, model: Any, *, mode: str = "average", extra: Mapping[str, Any] | None = None) -> None:
    """Saves a model that ``attach`` was called with, or a DeepSpeed engine, with its optimizer's states and clocks.

    Args:
        path: the folder; one that is there already is replaced once the new one is whole.
        mode: "average", "sync" or "exact".
        extra: whatever else training needs to go on, such as ``{"scheduler": scheduler.state_dict(), "batch": 1200}``.
            That of this rank with "exact", otherwise that of the first rank.

    Collective over all ranks. Raises ``ConfigError`` for an unknown mode or a model that nothing is attached to.
    """
    if mode not in MODES:
        raise ConfigError("save(mode=...)", f"one of {', '.join(MODES)}", repr(mode), "choose one")
    attachment, final = attachment_of(model), Path(path)
    holder, topology, groups = holder_of(model, attachment), attachment.topology, attachment.groups
    if mode == "exact" and len(attachment.averaging.late):
        raise ConfigError('save(mode="exact")', "no average in flight, or one that lands at the next step", "one with delay "
                          f"{attachment.config.deslo.delay}", f"save {attachment.config.deslo.delay} steps later, or another mode")
    if mode == "sync":
        attachment.averaging.meet()
    tree = holder.tree()
    if mode == "average":
        tree |= _means(tree, attachment)
    first, part = topology.rank == topology.ranks[0], final.with_name(final.name + ".part")
    if first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    _barrier(groups.world)
    if mode == "exact":
        own = {str(topology.rank): pickle.dumps({"random": _random_state(), "extra": dict(extra or {})})}
        dcp.save({"state": tree, "ranks": own}, checkpoint_id=part / f"replica_{topology.replica}", process_group=groups.shard)
    else:
        dcp.save({"state": tree, "extra": pickle.dumps(dict(extra or {}))}, checkpoint_id=part, process_group=groups.world)
    _barrier(groups.world)
    if first:
        kept = [{key: float(group[key]) for key in KEPT if key in group} for group in holder.groups]
        write_proof(part, Proof(mode, topology.rows, attachment.averaging.steps, holder.states, kept))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    _barrier(groups.world)


@torch.no_grad()
def load(path: str | Path, model: Any) -> dict[str, Any]:
    """Loads what ``save`` saved into an attached model or an engine, and returns its ``extra``.

    Averages that were in flight are dropped, and start again from what was loaded. Collective over all ranks.

    Raises ``ConfigError`` on every rank for a folder that is torn, altered or foreign, for other parameters or states than
    the model has, and for an "exact" checkpoint of other replicas or shards.
    """
    attachment, folder = attachment_of(model), Path(path)
    holder, topology, groups = holder_of(model, attachment), attachment.topology, attachment.groups
    proof, where = read_proof(folder), f"load({str(folder)!r})"
    prove(folder, groups.world)
    if proof.mode == "exact" and proof.rows != topology.rows:
        raise ConfigError(
            where, f"the {len(proof.rows)} replica(s) of {len(proof.rows[0])} rank(s) that saved it",
            f"{topology.replicas} of {topology.replica_size}", 'start as many, or load one that was saved with mode "average"',
        )
    holder.prepare(proof.states)
    refuse_others(holder.states, proof.states, where)
    attachment.averaging.abandon()
    tree = holder.tree()
    if proof.mode == "exact":
        content = {"state": tree, "ranks": {str(topology.rank): b""}}
        dcp.load(content, checkpoint_id=folder / f"replica_{topology.replica}", process_group=groups.shard)
        own = pickle.loads(content["ranks"][str(topology.rank)])
        _set_random_state(own["random"])
        extra = own["extra"]
    else:
        content = {"state": tree, "extra": b""}
        dcp.load(content, checkpoint_id=folder, process_group=groups.world)
        extra = pickle.loads(content["extra"])
        if len(proof.rows) != topology.replicas:
            say(f"deslo: {topology.replicas} replica(s) go on from a checkpoint of {len(proof.rows)}: the batch of all replicas "
                "changes with them, the learning rate is as you configure it")
    holder.put(content["state"])
    if len(proof.groups) == len(holder.groups):
        for group, saved in zip(holder.groups, proof.groups):
            group.update({key: type(group.get(key, value))(value) for key, value in saved.items()})
    return extra


def attachment_of(model: Any) -> Attachment:
    """Of an engine or a model. Raises ``ConfigError`` for one that nothing is attached to."""
    if isinstance(model, nn.Module) and model in attached:
        return attached[model]
    if hasattr(model, "basic_optimizer") and hasattr(model, "deslo"):
        return model.deslo
    raise ConfigError("save or load", "a DeepSpeed engine with a deslo block, or a model that attach was called with",
                      type(model).__name__, "call deslo_plugin.attach(model, optimizer) first")


def _means(tree: Tree, attachment: Attachment) -> Tree:
    """Of all floating tensors with dimensions; the others, clocks and counters, are alike on all replicas."""
    names = [name for name, value in tree.items() if isinstance(value, Tensor) and value.is_floating_point() and value.ndim]
    means = attachment.averaging.means("checkpoint", local([tree[name] for name in names]))
    return {name: _like(mean.to(tree[name].dtype), tree[name]) for name, mean in zip(names, means)}


def _like(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` as this rank's shard of a tensor that is sharded as ``whole`` is."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _barrier(world: dist.ProcessGroup | None) -> None:
    if world is not None:
        dist.barrier(group=world)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
