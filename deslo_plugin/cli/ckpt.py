"""``deslo ckpt inspect``: what is in a checkpoint, of which replicas, and is it whole?"""

import json
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from deslo_plugin.cli.printing import FAILED, Json, bytes_of, command, show, show_json, table
from deslo_plugin.frameworks.proof import NAME, OLD, PART, Proof, damaged, latest, read_proof
from deslo_plugin.names import PARAMS
from deslo_plugin.strict import ConfigError

METADATA = ".metadata"


@command
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint of deslo_plugin.save, or a folder of them: then the latest.")],
    as_json: Json = False,
) -> None:
    """Mode, replicas and shards, steps, parameters and states of a checkpoint; every file is read and its checksum compared.

    Status 1 if it is torn. Tensors' dtypes come from a pickled index: inspect only what you would load.
    """
    folder = path if (path / NAME).exists() else latest(path) if path.is_dir() else None
    if folder is None:
        found = f"none in {str(path)!r}{_hint(path)}"
        raise ConfigError("deslo ckpt inspect", f"a folder with {NAME}, or folders of such in it", found, "check the path")
    proof, problems = read_proof(folder), damaged(folder, None)
    files = json.loads((folder / NAME).read_text())["files"]
    content = _content(folder, proof, files, problems)
    if as_json:
        show_json(content)
    else:
        show(*_shown(content))
    raise typer.Exit(FAILED if problems else 0)


def _content(folder: Path, proof: Proof, files: dict[str, list[int]], problems: dict[str, str]) -> dict[str, Any]:
    states, indices = _states(folder, files, problems)
    params = [states[PARAMS] for states in proof.states.values()]
    return {
        "path": str(folder), "mode": proof.mode, "steps": proof.steps,
        "replicas": len(proof.rows), "replica_size": len(proof.rows[0]),
        "parameters": sum(prod(shape) for shape in params), "parameter_tensors": len(params),
        "param_groups": [dict(group) for group in proof.groups],
        "copies_of_the_state": indices, "states": states,
        "files": len(files), "bytes": sum(size for size, _ in files.values()),
        "whole": not problems, "damaged": problems,
    }


def _states(folder: Path, files: dict[str, list[int]], problems: dict[str, str]) -> tuple[dict[str, Any], int]:
    """(state -> tensors, elements, bytes and dtypes of one copy, how many copies), from the first index that is whole."""
    indices = [name for name in sorted(files) if Path(name).name == METADATA]
    found: dict[str, Any] = defaultdict(lambda: {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
    for name in [name for name in indices if name not in problems][:1]:
        for key, stored in dcp.FileSystemReader((folder / name).parent).read_metadata().state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                state, dtype = found[key.split("/", 1)[0]], stored.properties.dtype
                state["tensors"] += 1
                state["elements"] += stored.size.numel()
                state["bytes"] += stored.size.numel() * dtype.itemsize
                state["dtypes"] = sorted({*state["dtypes"], str(dtype).removeprefix("torch.")})
    return dict(found), len(indices)


def _shown(content: dict[str, Any]) -> list[Any]:
    kind = {"average": "one model, the mean of all replicas", "sync": "one model, on which all replicas met",
            "exact": "every replica's own state"}[content["mode"]]
    lines = [
        f"{content['path']}: mode {content['mode']}, {kind}, after {content['steps']:,} steps of "
        f"{content['replicas']} replica(s) of {content['replica_size']} rank(s)",
        f"{content['parameters']:,} parameters in {content['parameter_tensors']} tensors; learning rates "
        + ", ".join(f"{group['lr']:g}" for group in content["param_groups"] if "lr" in group) + "\n",
    ]
    copies = f", each of {content['copies_of_the_state']} copies" if content["copies_of_the_state"] > 1 else ""
    states = table(f"States{copies}", ("state", "dtypes", "tensors", "elements", "bytes"), [
        (name, ", ".join(each["dtypes"]), f"{each['tensors']:,}", f"{each['elements']:,}", bytes_of(each["bytes"]))
        for name, each in content["states"].items()
    ], words=2)
    whole = f"whole: {content['files']} files, {bytes_of(content['bytes'])}, every checksum as it was saved"
    torn = [f"TORN: {name}: {problem}" for name, problem in content["damaged"].items()]
    return [*lines, states, *(torn or [whole])]


def _hint(path: Path) -> str:
    if path.name.endswith(PART):
        return f"; a name in {PART} is a save that was cut off"
    old = path.with_name(path.name + OLD)
    return f"; the one before it is {str(old)!r}" if old.exists() else ""
