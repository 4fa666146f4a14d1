"""Checkpoints that tell the truth about replicas: one averaged model, or every replica's own state.

A checkpoint is a folder: ``torch.distributed.checkpoint`` files and ``deslo.json``, which says what they are and proves that
they are whole. It appears under its name only when it is complete, and all ranks must see it.

    average   one consistent model: parameters, momenta and buffers are averaged into the checkpoint; the replicas go on as
              they are. Loads on any number of replicas and shards, in every framework.
    sync      the replicas average in place first, and go on from there.
    exact     every replica's own state, and every rank's random numbers: resumes to the last bit, in the middle of any
              period, on the same replicas and shards.
"""

import pickle
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from deslo_plugin.collectives import gathered
from deslo_plugin.config import CHECKPOINTS
from deslo_plugin.frameworks.attachment import Attachment, attachments_of
from deslo_plugin.frameworks.fragment import Fragment, LoadFragments, SaveFragments
from deslo_plugin.frameworks.proof import OLD, PART, Proof, measured, prove, read_proof, write_proof
from deslo_plugin.frameworks.state_tree import KEPT, Tree, holder_of, refuse_others
from deslo_plugin.log import say
from deslo_plugin.names import BUFFERS, PARAMS
from deslo_plugin.strict import ConfigError


@torch.no_grad()
def save(path: str | Path, model: Any, *, mode: str | None = None, extra: Mapping[str, Any] | None = None) -> None:
    """Saves a model that ``attach`` was called with, or a DeepSpeed engine, with its optimizer's states and clocks.

    Args:
        path: the folder; one that is there already is replaced once the new one is whole.
        mode: "average", "sync" or "exact"; by default ``deslo.checkpoint`` of the config.
        extra: whatever else training needs to go on, such as ``{"scheduler": scheduler.state_dict(), "batch": 1200}``; any
            values that pickle. That of this rank with "exact", otherwise that of the first rank.

    Collective over all ranks. Raises ``ConfigError`` for an unknown mode or a model that nothing is attached to, and
    ``OSError`` on every rank if any rank cannot write.
    """
    attachments, final = attachments_of(model, "save"), Path(path)
    attachment, *_ = attachments
    mode = mode or attachment.config.deslo.checkpoint
    if mode not in CHECKPOINTS:
        raise ConfigError("save(mode=...)", f"one of {', '.join(CHECKPOINTS)}", repr(mode), "choose one")
    holder, topology, world = holder_of(model, attachments), attachment.topology, attachment.groups.world
    first, part = topology.rank == min(topology.ranks), final.with_name(final.name + PART)
    all_or_none(lambda: _begin(part) if first else None, world)
    all_or_none(lambda: part.stat(), world)  # a folder that not all ranks see would hold a part of the state
    if mode == "sync":
        meet(model)
    tree = holder.tree()
    if mode == "average":
        tree |= _means(tree, attachments)
    where, name, group = _place(part, mode, attachment)
    if first or mode == "exact":
        own = {"aside": holder.aside(), "extra": dict(extra or {})}
        if mode == "exact":
            own |= {"random": _random_state(), "averaging": [each.averaging.aside() for each in attachments]}
        tree[name] = pickle.dumps(own)
    dcp.save(tree, checkpoint_id=where, process_group=group, planner=SaveFragments(flatten_state_dict=False))
    numbers = [{key: float(group[key]) for key in KEPT if key in group} for group in holder.groups]
    proof = Proof(mode, topology.rows, attachment.averaging.steps, holder.states, numbers)
    all_or_none(lambda: None, world)  # every file is there
    files = measured(part, world)
    all_or_none(lambda: write_proof(part, proof, files) if first else None, world)
    all_or_none(lambda: replace(final, part) if first else None, world)


@torch.no_grad()
def meet(model: Any) -> None:
    """Averages parameters, states and buffers of all replicas in place, whatever is due: they are equal then. Collective.

    Takes an attached model or an engine, like ``save``.
    """
    attachments = attachments_of(model, "meet")
    holder = holder_of(model, attachments)
    tree = holder.tree()
    means = _means(tree, attachments)
    for name, mean in means.items():
        for piece, new in zip(_pieces(tree[name]), _pieces(mean)):
            piece.copy_(new)
    holder.put(tree)
    for each in attachments:
        each.averaging.abandon()
        each.averaging.met()


@torch.no_grad()
def load(path: str | Path, model: Any) -> dict[str, Any]:
    """Loads what ``save`` saved into an attached model or an engine, and returns its ``extra``.

    Averages that were in flight are dropped, and start again from what was loaded. Collective over all ranks. An extra is
    read with ``pickle``: load only what you trust.

    Raises ``ConfigError`` on every rank, and changes nothing, for a folder that is torn, altered or foreign, for other
    parameters or states than the model has, and for an "exact" checkpoint of other replicas or shards.
    """
    attachments, folder = attachments_of(model, "load"), _found(Path(path))
    attachment, *_ = attachments
    holder, topology, world = holder_of(model, attachments), attachment.topology, attachment.groups.world
    all_or_none(lambda: read_proof(folder), world)
    proof, where = read_proof(folder), f"load({str(folder)!r})"
    prove(folder, world)
    if proof.mode == "exact" and proof.rows != topology.rows:
        raise ConfigError(
            where, f"the {len(proof.rows)} replica(s) of {len(proof.rows[0])} rank(s) that saved it",
            f"{topology.replicas} of {topology.replica_size}", 'start as many, or load one that was saved with mode "average"',
        )
    all_or_none(lambda: holder.prepare(proof.states), world)
    refuse_others(holder.states, proof.states, where)
    for each in attachments:
        each.averaging.abandon()
    source, name, group = _place(folder, proof.mode, attachment)
    content = holder.tree() | {name: b""}
    dcp.load(content, checkpoint_id=source, process_group=group, planner=LoadFragments(flatten_state_dict=False))
    own = pickle.loads(content.pop(name))
    if proof.mode == "exact":
        _set_random_state(own["random"])
        for each, aside in zip(attachments, own["averaging"]):
            each.averaging.put_aside(aside)
    elif len(proof.rows) != topology.replicas:
        say(f"deslo: {topology.replicas} replica(s) go on from a checkpoint of {len(proof.rows)}: the batch of all replicas "
            "changes with them, the learning rate stays as it was saved")
    _take_over(proof.groups, holder.groups)
    holder.put(content)
    holder.put_aside(own["aside"], proof.steps)
    for each in attachments if proof.mode != "exact" else ():
        each.averaging.met()
    return own["extra"]


def saved_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The model's parameters and buffers out of a checkpoint, on the CPU: in one process, without the model or replicas.

    Raises ``ConfigError`` for a folder that is torn, altered or foreign, and for the replicas of an "exact" checkpoint.
    """
    folder = _found(Path(path))
    if read_proof(folder).mode == "exact":
        raise ConfigError(f"saved_state_dict({str(folder)!r})", "one model", "every replica's own, saved with mode \"exact\"",
                          'load it and save with mode "average"')
    prove(folder, None)
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    names = [name for name in stored if name.startswith((f"{PARAMS}/", "buffers/"))]
    state = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    dcp.load(state, checkpoint_id=folder, no_dist=True, planner=LoadFragments(flatten_state_dict=False))
    return {name.split("/", 1)[1]: tensor for name, tensor in state.items()}


def _take_over(saved: Sequence[Mapping[str, float]], groups: Sequence[dict[str, Any]]) -> None:
    """The numbers of each param group, into a tensor where the group keeps one."""
    if len(saved) != len(groups):
        say(f"deslo: {len(groups)} param group(s) go on from a checkpoint of {len(saved)}: learning rates are as configured")
        return
    for group, numbers in zip(groups, saved):
        for key, value in numbers.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value


def _begin(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def all_or_none(act: Callable[[], object], world: dist.ProcessGroup | None) -> None:
    """``act()`` on every rank; if it fails on any, it has failed on all, so that none waits: a ``ConfigError``, or ``OSError``."""
    try:
        act()
        problem = None
    except ConfigError as error:
        problem = error
    except Exception as error:
        problem = repr(error)
    for rank, problem in (gathered(problem, world) if world is not None else {0: problem}).items():
        if isinstance(problem, ConfigError):
            raise problem
        if problem:
            raise OSError(f"checkpoint: rank {rank} failed: {problem}; expected a folder that every rank can see and write to")


def replace(final: Path, part: Path) -> None:
    """Puts the folder ``part`` in the place of ``final``; cut off anywhere, one of both is left whole, and found by ``load``."""
    old = final.with_name(final.name + OLD)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _place(folder: Path, mode: str, attachment: Attachment) -> tuple[Path, str, dist.ProcessGroup | None]:
    """Where a rank's part goes, the key of what else it keeps, and with whom it writes one state."""
    if mode == "exact":
        rank, replica = attachment.topology.rank, attachment.topology.replica
        return folder / f"replica_{replica}", f"rank_{rank}", attachment.groups.shard
    return folder, "first_rank", attachment.groups.world


def _found(path: Path) -> Path:
    old = path.with_name(path.name + OLD)
    if not path.exists() and old.exists():
        say(f"deslo: {path} was being replaced when it was cut off; loading the one before, {old}")
        return old
    return path


def _means(tree: Tree, attachments: Sequence[Attachment]) -> Tree:
    """Of all floating tensors but clocks and counters, state by state; those are alike on all replicas."""
    means: Tree = {}
    groups = [group for each in attachments for group in each.averaging.groups]
    scheduled = {PARAMS, BUFFERS, *(state for group in groups for state in group["sync_every"])}
    for state, names in groupby(sorted(tree), key=lambda name: name.split("/", 1)[0]):
        named = {name: pieces for name in names if (pieces := _pieces(tree[name], 0 if state in scheduled else 1))}
        flat = iter(attachments[0].averaging.means("checkpoint", [piece for pieces in named.values() for piece in pieces]))
        for name, pieces in named.items():
            own = [next(flat).to("cpu", piece.dtype) for piece in pieces]
            means[name] = tree[name].like(own) if isinstance(tree[name], Fragment) else own[0]
    return means


def _pieces(value: Any, ndim: int = 0) -> list[Tensor]:
    """This rank's floating parts of ``value``, of ``ndim`` dimensions or more."""
    pieces = [piece for _, piece in value.pieces] if isinstance(value, Fragment) else [value]
    return [piece for piece in pieces if isinstance(piece, Tensor) and piece.is_floating_point() and piece.ndim >= ndim]


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    if state["numpy"] is not None and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
