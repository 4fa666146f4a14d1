"""DeepSpeed's universal checkpoints, a folder for each parameter: what replicas may start from."""

import pickle
from collections.abc import Mapping, Sequence, Set
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.algorithm.state_names import BUFFERS, ORIGIN, PARAMS, SECOND_MOMENT, STEP, is_of_wire
from deslo_plugin.attachment import Attachment
from deslo_plugin.checkpoint.load_averaged import READ
from deslo_plugin.checkpoint.location import in_object_store
from deslo_plugin.checkpoint.state_tree import adapter_of
from deslo_plugin.checkpoint.tensor_chunks import TensorChunks, of_dtensor
from deslo_plugin.checkpoint.tree_agreement import States, Tree
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.config.switch import refuse_other_switch
from deslo_plugin.errors import ConfigError
from deslo_plugin.log import log_rank0
from deslo_plugin.optim.adam_states import awaited_momenta, refuse_adams_momenta
from deslo_plugin.optim.desloc import DesLoc

PARTS, WEIGHTS, ADAM = "zero", "fp32", ("exp_avg", SECOND_MOMENT)


class Universal(NamedTuple):
    """A folder: its parameters, the steps that they have seen, and the engine's own state."""

    folder: Path
    names: list[str]
    steps: int
    engine: Mapping[str, Any]

    def tensor(self, name: str, state: str) -> Tensor:
        """Mapped, and read where it is used. Of ZeRO-3 it is flat, and its shape in the engine's state."""
        found = _read(self.folder / PARTS / name / f"{state}.pt")
        if isinstance(found, Mapping):
            whole: Tensor = found["param"]
            return whole
        shape = next(group[name] for group in self.engine["param_shapes"] if name in group)
        flat: Tensor = found.flatten()[: prod(shape)]
        return flat.view(shape)

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(self.tensor(name, WEIGHTS).shape) for name in self.names}

    def has(self, name: str, state: str) -> bool:
        return (self.folder / PARTS / name / f"{state}.pt").is_file()


def is_universal(folder: Path) -> bool:
    return next(folder.glob(f"{PARTS}/*/{WEIGHTS}.pt"), None) is not None


def read_universal(folder: Path) -> Universal:
    """Nothing in the files runs. Raises ``ConfigError`` for what would have to, and for what is missing."""
    if in_object_store(folder):
        raise ConfigError(
            f"load({str(folder)!r})",
            "a universal checkpoint on a disk, whose files are mapped",
            "one in an object store",
            "copy it to a disk that every rank sees",
        )
    names = sorted(file.parent.name for file in folder.glob(f"{PARTS}/*/{WEIGHTS}.pt"))
    files = sorted(folder.glob("*model_states.pt"))
    if not files:
        raise ConfigError(
            f"load({str(folder)!r})",
            "*model_states.pt beside zero/, as ds_to_universal writes it",
            "none",
            "convert the checkpoint again, whole",
        )
    engine = _read(files[0])
    counted = [
        _read(folder / PARTS / name / f"{STEP}.pt") for name in names if Universal(folder, [], 0, {}).has(name, STEP)
    ]
    steps = int(max(counted, default=engine["global_steps"] - engine["skipped_steps"]))
    return Universal(folder, names, steps, engine)


def load_universal(folder: Path, model: Any, attachments: Sequence[Attachment]) -> dict[str, Any]:
    """Starts every replica from ``folder``: weights and Adam's two moments, after as many steps. Rates and periods are
    those of the config, and a scheduler of the engine's goes on. Collective over all ranks, like ``load``."""
    attachment, adapter = attachments[0], adapter_of(model, attachments)
    where, world = f"load({str(folder)!r})", attachment.groups.world
    saved = all_or_none(lambda: read_universal(folder), world, READ)
    if world is not None:
        content = {"steps": saved.steps, "parameters": saved.names}
        check_same_on_all_ranks(where, content, do="give every rank the same folder", group=world)
    refuse_other_switch(where, None, attachment.config.switch, saved.steps)
    absent = all_or_none(lambda: _expect_adam(where, saved, attachments), world)
    shapes = all_or_none(lambda: saved.shapes(), world, READ)
    begun = {name: {PARAMS: shape, STEP: [], **dict.fromkeys(ADAM, shape)} for name, shape in shapes.items()}
    all_or_none(lambda: adapter.prepare(begun), world)
    own = adapter.states
    all_or_none(lambda: _expect_same(where, saved, shapes, own), world)
    for each in attachments:
        each.averaging.wire.make_room()
        each.averaging.abandon()
    of_wire = [name for name in adapter.tree() if is_of_wire(name.split("/", 1)[0])]
    all_or_none(lambda: adapter.forget(of_wire), world)
    tree = all_or_none(adapter.tree, world)
    again = f"{READ}; a part was loaded: load again before training"
    all_or_none(lambda: _fill(tree, saved, absent), world, again)
    adapter.put(tree)
    counts = {name: saved.engine[name] for name in ("global_steps", "skipped_steps")}
    aside = {"counts": counts, "scheduler": saved.engine.get("lr_scheduler")}
    all_or_none(lambda: adapter.set_extra_state(aside, saved.steps), world)
    for each in attachments:
        each.averaging.mark_synchronized()
    log_rank0(
        f"deslo: every replica begins with {folder}, a universal checkpoint of DeepSpeed, after {saved.steps} steps; "
        "learning rates are as configured"
    )
    return {}


def _expect_adam(where: str, saved: Universal, attachments: Sequence[Attachment]) -> set[str]:
    """Raises ``ConfigError`` for a DesLoc that Adam's two moments are not enough for; else those of its momenta that
    begin at the switch, and are in no file."""
    absent: set[str] = set()
    for desloc in (each.optimizer for each in attachments if isinstance(each.optimizer, DesLoc)):
        for config in map(desloc.rule_of, desloc.param_groups):
            begin_later = awaited_momenta(config, saved.steps)
            wanted = {*config.moments} - {*begin_later}
            if wanted != {*ADAM} or RULES[config.rule].of_matrices or config.outer_optimizer:
                raise ConfigError(
                    where,
                    f"rule adam or adopt with {' and '.join(ADAM)}, which is what universal checkpoints keep, and "
                    "further momenta that begin at a switch",
                    f"rule {config.rule} with {', '.join(config.moments)}"
                    + (" and an outer optimizer" if config.outer_optimizer else ""),
                    "take such a rule, or begin with the weights alone, loaded into the model before the optimizer",
                )
            refuse_adams_momenta(where, config, saved.steps)
            absent |= {*begin_later}
    return absent


def _expect_same(where: str, saved: Universal, shapes: Mapping[str, list[int]], own: States) -> None:
    """Raises ``ConfigError`` for other parameters, shapes or states than the model has."""
    for name in dict.fromkeys([*own, *shapes]):
        mine = own.get(name, {}).get(PARAMS)
        if name not in own or mine is None or list(mine) != shapes.get(name):
            raise ConfigError(
                f"{where} {name}",
                f"the parameters of this model, {list(mine) if mine is not None else 'none of that name'}",
                str(shapes.get(name, "none of that name")),
                "build the model that was saved",
            )
        for state in ADAM:
            if state in own[name] and not saved.has(name, state):
                raise ConfigError(f"{where} {name}", f"its {state}", "none", "convert the checkpoint again, whole")


def _fill(tree: Tree, saved: Universal, absent: Set[str]) -> None:
    for key, value in tree.items():
        state, name = key.split("/", 1)
        if state == BUFFERS:
            if (buffer := saved.engine["module"].get(name)) is not None:
                value.copy_(buffer)
        elif state == PARAMS or state in ADAM:
            _copy(value, saved.tensor(name, WEIGHTS if state == PARAMS else state))
        elif state in absent:
            _copy(value, None)
        else:  # counters
            own = int(_read(saved.folder / PARTS / name / f"{STEP}.pt")) if saved.has(name, STEP) else saved.steps
            count = {STEP: saved.steps, ORIGIN: saved.steps - own}.get(state, 0)
            tree[key] = value.fill_(count) if isinstance(value, Tensor) else count


def _copy(target: Any, whole: Tensor | None) -> None:
    """``whole``, or zeros, into what lies on this rank."""
    if hasattr(target, "to_local"):
        target = of_dtensor(target)
    pieces = target.pieces if isinstance(target, TensorChunks) else ((tuple(0 for _ in target.shape), target),)
    for offset, piece in pieces:
        if whole is None:
            piece.zero_()
        else:
            piece.copy_(whole[tuple(slice(at, at + size) for at, size in zip(offset, piece.shape))])


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, KeyError, RuntimeError) as error:
        raise ConfigError(
            str(file), "a file of tensors and plain values", str(error).splitlines()[0], "convert the checkpoint again"
        ) from error
