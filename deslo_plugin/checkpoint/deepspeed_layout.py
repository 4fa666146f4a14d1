"""One model of ours in DeepSpeed's own layout, for tools that know that alone."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import BUFFERS, ORIGIN, PARAMS, STEP
from deslo_plugin.checkpoint.folder import found, write_whole
from deslo_plugin.checkpoint.index import read_index, read_tree, tensors_of
from deslo_plugin.checkpoint.load_averaged import READ, load_averaged_state_dict
from deslo_plugin.checkpoint.location import location, make_folder
from deslo_plugin.checkpoint.manifest import read_manifest
from deslo_plugin.checkpoint.universal import ADAM, PARTS, WEIGHTS
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.errors import ConfigError
from deslo_plugin.log import log_rank0

SINCE = "0.19.8"  # of DeepSpeed: whose layout this is


def export_deepspeed(path: str | Path, out: str | Path, tag: str | None = None) -> Path:
    """Writes a checkpoint of ``deslo_plugin.save``, mode "averaged" or "synchronized", as DeepSpeed would have: its
    ``zero_to_fp32`` and all that is built on it read ``out``, and a job without us goes on from there, of any number of
    ranks, with ``"checkpoint": {"load_universal": true}``. In one process, without the model.

    DeepSpeed knows Adam's two moments alone: further momenta stay in the checkpoint, and a line says so.

    Args:
        path: the checkpoint.
        out: the folder that ``engine.load_checkpoint`` and the tools are given.
        tag: by default ``global_step`` and the steps.

    Returns ``out/tag``. Raises ``ConfigError`` for a folder that is torn, altered or foreign, for the replicas of an
    "per_replica" checkpoint, and where ``out/tag`` is there already.
    """
    folder = found(path)
    weights = load_averaged_state_dict(folder)
    proof, index = read_manifest(folder), read_index(folder)
    stored = tensors_of(index)
    out = location(out)
    target = out / (tag or f"global_step{proof.steps}")
    if target.exists():
        raise ConfigError(f"export_deepspeed({str(out)!r})", "a new folder", f"{target}", "give another folder or tag")
    for name in proof.states:  # a folder of its own for each, and a name out of a file must not lead elsewhere
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ConfigError(
                f"export_deepspeed({str(path)!r})",
                "parameter names that are names of folders, as DeepSpeed's layout has them",
                repr(name),
                "rename the parameter, and do not trust this checkpoint if it is not yours",
            )

    def tensor(state: str, name: str) -> Tensor:
        key = f"{state}/{name}"
        tree = {key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype)}
        all_or_none(lambda: read_tree(tree, folder, index, None, alone=True), None, READ)
        return tree[key]

    trained = [name for name, states in proof.states.items() if set(states) - {PARAMS}]
    updates = proof.steps - min(
        (int(tensor(ORIGIN, name)) for name in trained if f"{ORIGIN}/{name}" in stored), default=0
    )
    step = torch.tensor(updates)  # whole, which torch's Adam and DeepSpeed's kernels both count on
    named = {place: name for name, place in reversed([*proof.names.items()])}  # the first of several
    params = OrderedDict((name, weights[named[f"{PARAMS}/{name}"]]) for name in proof.states)
    for name, value in params.items():
        own = {WEIGHTS: value} | {state: tensor(state, name) for state in ADAM if f"{state}/{name}" in stored}
        for state, whole in own.items():
            _write(target / PARTS / name / f"{state}.pt", {"param": whole.float(), "cat_dim": 0})
        if name in trained:
            _write(target / PARTS / name / f"{STEP}.pt", step)
    _write(target / PARTS / "optimizer_state.pt", _optimizer(proof.groups, step))
    engine = _model(weights, proof, params, trained)
    _write(target / "mp_rank_00_model_states.pt", engine)
    _write(target / "zero_pp_rank_0_mp_rank_00_model_states.pt", engine | {"module": {}})  # where ZeRO-3 looks
    _write(target / "zero_pp_rank_0_mp_rank_00_optim_states.pt", _flat([params[name] for name in trained]))
    for latest in ("latest", "latest_universal"):
        write_whole(out / latest, lambda file: file.write(target.name.encode()))
    left = sorted({state for name in trained for state in proof.states[name]} - {PARAMS, STEP, ORIGIN, *ADAM})
    if left:
        log_rank0(f"deslo: {target} is without {', '.join(left)}, which DeepSpeed does not know")
    return target


def _model(weights: dict[str, Tensor], proof: Any, params: dict[str, Tensor], trained: list[str]) -> dict[str, Any]:
    """What ``engine.save_checkpoint`` keeps of a model at ZeRO stage 2, in one process."""
    first: dict[str, str] = {}
    shared = {name: first[place] for name, place in proof.names.items() if first.setdefault(place, name) != name}
    frozen = OrderedDict((name, value) for name, value in params.items() if name not in trained)
    return {
        "module": weights,
        "buffer_names": [name for name, place in proof.names.items() if place.startswith(f"{BUFFERS}/")],
        "param_shapes": [OrderedDict((name, params[name].shape) for name in trained)],
        "frozen_param_shapes": OrderedDict((name, value.shape) for name, value in frozen.items()) or None,
        "frozen_param_fragments": frozen or None,
        "shared_params": shared,
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": proof.steps,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": SINCE,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }


def _optimizer(groups: Any, step: Tensor) -> dict[str, Any]:
    own = [{**group, "params": []} for group in groups]
    states = {index: {STEP: step.clone()} for index in range(max(1, len(own)))}
    return {"param_groups": own, "ds_version": SINCE, "optimizer_state_dict": {"state": states, "param_groups": own}}


def _flat(trained: list[Tensor]) -> dict[str, Any]:
    flat = torch.cat([value.flatten().float() for value in trained]) if trained else torch.empty(0)
    kept = {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [flat]}
    return {"optimizer_state_dict": kept, "ds_config": {}, "ds_version": SINCE}


def _write(file: Path, value: Any) -> None:
    make_folder(file.parent)
    write: Callable[[Any], object] = lambda content: torch.save(value, content)
    write_whole(file, write)
