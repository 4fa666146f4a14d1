"""Checkpoints that tell the truth about replicas: one averaged model, or every replica's own state.

A checkpoint is a folder: ``torch.distributed.checkpoint`` files and ``deslo.json``, which says what they are and proves
that they are whole. It appears under its name only when it is complete, and all ranks must see it.

    average   one consistent model: parameters, momenta and buffers are averaged into the checkpoint; the replicas go on
    as
              they are. Loads on any number of replicas and shards, in every framework.
    sync      the replicas average in place first, and go on from there.
    exact     every replica's own state, and every rank's random numbers: resumes to the last bit, in the middle of any
              period, on the same replicas and shards.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from deslo_plugin.algorithm.state_names import is_of_wire
from deslo_plugin.attachment import Attachment, attachments_of, on_every_rank
from deslo_plugin.checkpoint.content import Content, place
from deslo_plugin.checkpoint.folder import Destination, begin, found
from deslo_plugin.checkpoint.host_copy import when_copied
from deslo_plugin.checkpoint.index import read_index, read_tree
from deslo_plugin.checkpoint.load_averaged import READ
from deslo_plugin.checkpoint.location import absolute
from deslo_plugin.checkpoint.manifest import Manifest, read_manifest, verify
from deslo_plugin.checkpoint.pending_save import PendingSave, finish_pending_save, save_in_background
from deslo_plugin.checkpoint.plain_values import expect_mapping, plain, read_plain
from deslo_plugin.checkpoint.random_state import random_state, set_random_state
from deslo_plugin.checkpoint.state_tree import KEPT, StateAdapter, adapter_of
from deslo_plugin.checkpoint.sync_replicas import means_of, scheduled_states, sync_replicas
from deslo_plugin.checkpoint.tensor_chunks import TensorChunks
from deslo_plugin.checkpoint.tree_agreement import Tree, check_same_structure, united, unlike
from deslo_plugin.checkpoint.universal import is_universal, load_universal
from deslo_plugin.checkpoint.whole_model import names_of_all_parts, refuse_other_numbers
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.comm.process_groups import make_groups_of_files
from deslo_plugin.comm.transport import LiveTransport
from deslo_plugin.config.load import RENAMED_VALUES
from deslo_plugin.config.schema import CHECKPOINT_MODES, DIGESTS
from deslo_plugin.config.switch import refuse_other_switch
from deslo_plugin.errors import ConfigError
from deslo_plugin.log import log_rank0


@on_every_rank
@torch.no_grad()
def save(
    path: str | Path,
    model: Any,
    *,
    mode: str | None = None,
    extra: Mapping[str, Any] | None = None,
    digest: str | None = None,
    wait: bool = True,
) -> PendingSave | None:
    """Saves a model that ``attach`` was called with, or a DeepSpeed engine, with its optimizer's states and clocks.

    Args:
        path: the folder, or a URL such as ``s3://bucket/run/1200``; a checkpoint that is there already is replaced
            once the new one is whole.
        mode: "averaged", "synchronized" or "per_replica"; by default ``deslo.checkpoint_mode`` of the config.
        extra: whatever else training needs to go on, such as ``{"scheduler": scheduler.state_dict(), "batch": 1200}``:
            dicts, lists and tuples of text, bytes, numbers, None and tensors. That of this rank with "per_replica",
            otherwise that of the first rank.
        digest: "crc32", which finds accidents, or "sha256" beside it; by default ``deslo.checkpoint_digest`` of the
        config.
        wait: False copies the state into host memory, writes the files in the background, and returns a
            ``PendingSave``; the copy is kept until they are written. The next ``save`` or ``load``, the end of the
            process and ``destroy_process_group`` wait for it; what fails at writing is raised on every rank by
            ``PendingSave.wait()`` or, if no rank has called that, in place of the next ``save`` or ``load``.

    With a torchft manager it saves the replica that calls it, as it is, by the ranks of that replica alone.

    Collective over all ranks. On every rank, with the checkpoint that was there untouched: raises ``ConfigError`` for
    an unknown mode, a model that nothing is attached to, an ``extra`` that is no data, and a folder of other files;
    ``OSError`` if any rank cannot write.
    """
    attachments = attachments_of(model, "save")
    attachment, *_ = attachments
    mode, digest = mode or attachment.config.deslo.checkpoint_mode, digest or attachment.config.deslo.checkpoint_digest
    if not isinstance(wait, bool):
        raise ConfigError("save(wait=...)", "True or False", repr(wait), "choose one")
    for name, value, known in (("mode", mode, CHECKPOINT_MODES), ("digest", digest, DIGESTS)):
        if value not in known:
            do = f"write {RENAMED_VALUES[value]!r}, its name of today" if value in RENAMED_VALUES else "choose one"
            raise ConfigError(f"save({name}=...)", f"one of {', '.join(known)}", repr(value), do)
    groups = attachment.groups
    topology = groups.topology
    if attachment.live and mode == "synchronized":
        raise ConfigError(
            "save(mode=...)",
            '"averaged" or "per_replica" with a torchft manager, both of this replica',
            '"synchronized"',
            "choose one: no replica can ask the others at will",
        )
    if (world := groups.world) is not None:
        asked = {"mode": mode, "digest": digest, "wait": wait}
        check_same_on_all_ranks("save", asked, do="pass the same on every rank", group=world)
    final = all_or_none(lambda: absolute(path), world)
    finish_pending_save(topology, world)
    first = topology.rank == min(topology.ranks)
    adapter = adapter_of(model, attachments)
    if attachment.watch is not None:
        attachment.watch.check_inside()
    keeps = first or mode == "per_replica"
    own = all_or_none(lambda: _own(adapter, attachments, mode, extra) if keeps else None, world)
    to = begin(final, first, world)
    with to.cleared_away_on_error(first):
        content = _gather(to, model, adapter, attachments, mode, own, digest == "sha256")
        if wait:
            content.write(groups)
            return None
        copied = all_or_none(content.copied, world)
        when, of_files = when_copied(), make_groups_of_files(groups)

    def write() -> None:
        with to.cleared_away_on_error(first):
            copied.write(of_files, when)

    return save_in_background(topology, final, write)


def _gather(
    to: Destination,
    model: Any,
    adapter: StateAdapter,
    attachments: Sequence[Attachment],
    mode: str,
    own: Mapping[str, Any] | None,
    strong: bool,
) -> Content:
    """What goes into the folder: all of a save that asks the model, or other replicas' states."""
    attachment, *_ = attachments
    topology, world = attachment.groups.topology, attachment.groups.world
    if mode == "synchronized":
        sync_replicas(model)
    tree, means = all_or_none(lambda: _expect_plain(adapter.tree()), world), Tree()
    if mode != "per_replica":
        tree |= unlike(tree, scheduled_states(attachments), attachment.groups.replica)
    if mode == "averaged" and not attachment.live:  # of one replica that comes and goes its own state
        means = means_of(tree, attachments)
    numbers = [{key: float(group[key]) for key in KEPT if key in group} for group in adapter.groups]
    refuse_other_numbers(numbers, attachment)
    states, names = united(adapter.states, world), names_of_all_parts(adapter.names, attachment)
    steps, switch = attachment.averaging.steps, attachment.config.switch
    proof = Manifest(mode, topology.ranks_by_replica, steps, states, numbers, names, switch)
    return Content(to, tree | means, means.keys(), own, proof, strong)


@on_every_rank
@torch.no_grad()
def load(path: str | Path, model: Any, *, sha256: str | None = None) -> dict[str, Any]:
    """Loads what ``save`` saved into an attached model or an engine, and returns its ``extra``, tensors on the CPU.

    Averages that were in flight are dropped, and start again from what was loaded. Files are read as data: nothing in
    them runs. ``sha256``: that of the checkpoint's ``deslo.json``, kept where whoever writes to the folder cannot
    write.

    Collective over all ranks. Raises ``ConfigError`` on every rank, and changes nothing, for a folder that is torn,
    altered or foreign, for other parameters or states than the model has, and for an "per_replica" checkpoint of other
    replicas or shards. Raises ``OSError`` on every rank if any rank cannot read.
    """
    attachments = attachments_of(model, "load")
    attachment, *_ = attachments
    if attachment.live and cast(LiveTransport, attachment.averaging.transport).joined:
        raise ConfigError(
            "load(path, model)",
            "a replica that has taken no step yet, with a torchft manager",
            "one that trains among the others",
            "load on every replica before its first optimizer.step(), or start all of them anew",
        )
    finish_pending_save(attachment.groups.topology, attachment.groups.world)
    folder = all_or_none(lambda: found(path), attachment.groups.world, READ)
    if all_or_none(lambda: is_universal(folder), attachment.groups.world, READ):
        return load_universal(folder, model, attachments)
    adapter, topology, world = adapter_of(model, attachments), attachment.groups.topology, attachment.groups.world
    proof, where = all_or_none(lambda: read_manifest(folder, sha256), world, READ), f"load({str(folder)!r})"
    if world is not None:
        check_same_on_all_ranks(where, {"deslo.json": proof.digest}, do="give every rank the same folder", group=world)
    verify(folder, proof, world)
    refuse_other_switch(where, proof.switch, attachment.config.switch, proof.steps)
    if proof.mode == "per_replica" and proof.rows != topology.ranks_by_replica:
        raise ConfigError(
            where,
            f"the {len(proof.rows)} replica(s) of {len(proof.rows[0])} rank(s) that saved it",
            f"{topology.replicas} of {topology.replica_size}",
            'start as many, or load one that was saved with mode "averaged"',
        )
    source, name, group = place(folder, proof.mode, attachment.groups)
    index, own = all_or_none(lambda: (read_index(source), _expect_own(source / name, proof.mode)), world, READ)
    all_or_none(lambda: adapter.prepare(proof.states), world)
    for each in attachments:
        each.averaging.wire.make_room()
    states = united(adapter.states, world) if attachment.holders else adapter.states
    all_or_none(lambda: check_same_structure(states, proof.states, where), world)
    for each in attachments:
        each.averaging.abandon()
    all_or_none(lambda: adapter.forget(_absent(adapter, index, proof.mode)), world)
    content = all_or_none(adapter.tree, world)
    all_or_none(
        lambda: read_tree(content, source, index, group),
        world,
        f"{READ}; a part was loaded: load again before training",
    )
    all_or_none(lambda: _go_on(own, proof, attachments) if proof.mode == "per_replica" else None, world)
    if proof.mode != "per_replica" and len(proof.rows) != topology.replicas:
        log_rank0(
            f"deslo: {topology.replicas} replica(s) go on from a checkpoint of {len(proof.rows)}: the batch of all "
            "replicas changes with them, the learning rate stays as it was saved"
        )
    _take_over(proof.groups, adapter.groups)
    adapter.put(content)
    all_or_none(lambda: adapter.set_extra_state(own["aside"], proof.steps), world)
    for each in attachments if proof.mode != "per_replica" else ():
        each.averaging.mark_synchronized()
    return own["extra"]


def _own(adapter: StateAdapter, attachments: Sequence[Attachment], mode: str, extra: Any) -> dict[str, Any]:
    """What this rank keeps beside the tree, as plain values."""
    own = {
        "aside": plain(adapter.get_extra_state(), "save: what the engine counts in"),
        "extra": expect_mapping(extra, "save(extra)"),
    }
    if mode == "per_replica":
        averaging = [each.averaging.get_extra_state() for each in attachments]
        own |= {
            "random": plain(random_state(), "save: the random state"),
            "averaging": plain(averaging, "save: averages in flight"),
        }
    return own


def _expect_own(file: Path, mode: str) -> dict[str, Any]:
    own, keys = read_plain(file), {"aside", "extra"} | ({"random", "averaging"} if mode == "per_replica" else set())
    if not isinstance(own, dict) or not keys <= own.keys():
        raise ConfigError(str(file), f"a dict of {', '.join(sorted(keys))}", "another", "take another checkpoint")
    return own


def _absent(adapter: StateAdapter, index: Metadata, mode: str) -> list[str]:
    """States that the checkpoint lacks and training may go on without."""
    absent = [name for name in adapter.tree() if name not in index.state_dict_metadata]
    return [name for name in absent if mode == "per_replica" or is_of_wire(name.split("/", 1)[0])]


def _go_on(own: Mapping[str, Any], proof: Manifest, attachments: Sequence[Attachment]) -> None:
    """From an exact checkpoint: the same random numbers, the same averages in flight."""
    set_random_state(own["random"])
    for each, aside in zip(attachments, own["averaging"]):
        each.averaging.set_extra_state(aside)


def _expect_plain(tree: Tree) -> Tree:
    """Raises ``ConfigError`` for a state that ``load`` would not read back."""
    for name, value in tree.items():
        if not isinstance(value, TensorChunks) and not hasattr(value, "to_local"):
            plain(value, f"save: {name}")
    return tree


def _take_over(saved: Sequence[Mapping[str, float]], groups: Sequence[dict[str, Any]]) -> None:
    """The numbers of each param group, into a tensor where the group keeps one."""
    if len(saved) != len(groups):
        log_rank0(
            f"deslo: {len(groups)} param group(s) go on from a checkpoint of {len(saved)}: learning rates are as "
            f"configured"
        )
        return
    for group, numbers in zip(groups, saved):
        for key, value in numbers.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
