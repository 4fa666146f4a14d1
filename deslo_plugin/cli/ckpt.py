"""``deslo ckpt inspect``: what is in a checkpoint, of which replicas, and is it whole?"""

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.checkpoint.folder import complete, found, latest_checkpoint
from deslo_plugin.checkpoint.foreign import what_is_there
from deslo_plugin.checkpoint.index import INDEX, read_index, tensors_of
from deslo_plugin.checkpoint.location import in_object_store, location
from deslo_plugin.checkpoint.manifest import NAME, OLD, PART, Manifest, corrupted_files, read_manifest
from deslo_plugin.cli.output import FAILED, Json, bytes_of, command, show, show_json, table
from deslo_plugin.errors import ConfigError


@command
def inspect(
    path: Annotated[
        str, typer.Argument(help="A checkpoint of deslo_plugin.save, or a folder of them: then the latest. Or a URL.")
    ],
    as_json: Json = False,
) -> None:
    """Mode, replicas and shards, steps, parameters and states of a checkpoint; every file is read and its checksum
    compared.

    Status 1 if it is torn. Nothing in a checkpoint runs: what is inspected is data.
    """
    given = location(path)
    own = given if in_object_store(given) or given.exists() else None
    whole = own is not None and (found(own) / NAME).exists()
    folder = own if whole else latest_checkpoint(given) if given.is_dir() else None
    if folder is None:
        kind, do = what_is_there(given)
        raise ConfigError(
            f"deslo ckpt inspect {path}", f"a folder with {NAME}, or folders of such in it", kind + _hint(given), do
        )
    inside = found(folder)
    proof = read_manifest(inside)
    content = _content(inside, proof, corrupted_files(inside, proof, None)) | {
        "path": str(folder),
        "of": 1 if whole else len(complete(given)),
    }
    if as_json:
        show_json(content)
    else:
        show(*_shown(content))
    raise typer.Exit(FAILED if content["damaged"] else 0)


def _content(folder: Path, proof: Manifest, problems: dict[str, str]) -> dict[str, Any]:
    states, indices = _states(folder, proof, problems)
    params = [states[PARAMS] for states in proof.states.values()]
    return {
        "path": str(folder),
        "mode": proof.mode,
        "steps": proof.steps,
        "replicas": len(proof.rows),
        "replica_size": len(proof.rows[0]),
        "parameters": sum(prod(shape or ()) for shape in params),
        "parameter_tensors": len(params),
        "param_groups": [dict(group) for group in proof.groups],
        "copies_of_the_state": indices,
        "states": states,
        "files": len(proof.files),
        "bytes": sum(size for size, *_ in proof.files.values()),
        "digest": "sha256" if proof.strong else "crc32",
        "sha256": proof.digest,
        "whole": not problems,
        "damaged": problems,
    }


def _states(folder: Path, proof: Manifest, problems: dict[str, str]) -> tuple[dict[str, Any], int]:
    """(state -> tensors, elements, bytes and dtypes of one copy, how many copies), from the first index that is
    whole."""
    indices = [name for name in sorted(proof.files) if Path(name).name == INDEX]
    found: dict[str, Any] = defaultdict(lambda: {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
    for name in [name for name in indices if name not in problems][:1]:
        for key, stored in tensors_of(read_index((folder / name).parent)).items():
            state, dtype = found[key.split("/", 1)[0]], stored.properties.dtype
            state["tensors"] += 1
            state["elements"] += stored.size.numel()
            state["bytes"] += stored.size.numel() * dtype.itemsize
            state["dtypes"] = sorted({*state["dtypes"], str(dtype).removeprefix("torch.")})
    return {name: found[name] for name in sorted(found, key=lambda name: (name != PARAMS, name))}, len(indices)


def _shown(content: dict[str, Any]) -> list[Any]:
    kind = {
        "averaged": "one model, the mean of all replicas",
        "synchronized": "one model, on which all replicas met",
        "per_replica": "every replica's own state",
    }[content["mode"]]
    name = content["path"] + (f" (the latest of {content['of']})" if content["of"] > 1 else "")
    lines = [
        f"{name}: mode {content['mode']}, {kind}, after {content['steps']:,} steps of "
        f"{content['replicas']} replica(s) of {content['replica_size']} rank(s)",
        f"{content['parameters']:,} parameters in {content['parameter_tensors']} tensors; learning rates "
        + ", ".join(f"{group['lr']:g}" for group in content["param_groups"] if "lr" in group)
        + "\n",
    ]
    copies = f", each of {content['copies_of_the_state']} copies" if content["copies_of_the_state"] > 1 else ""
    states = table(
        f"States{copies}",
        ("state", "dtypes", "tensors", "elements", "bytes"),
        [
            (
                _printable(name),
                ", ".join(each["dtypes"]),
                f"{each['tensors']:,}",
                f"{each['elements']:,}",
                bytes_of(each["bytes"]),
            )
            for name, each in content["states"].items()
        ],
        words=2,
    )
    proved = (
        "every SHA-256 as it was saved; that of deslo.json, to be compared with the one you kept: " + content["sha256"]
        if content["digest"] == "sha256"
        else "every checksum (CRC-32, against accidents) as it was saved"
    )
    whole = f"whole: {content['files']} files, {bytes_of(content['bytes'])}, {proved}"
    torn = [f"TORN: {_printable(name)}: {_printable(problem)}" for name, problem in content["damaged"].items()]
    return [*lines, states, *(torn or [whole])]


def _printable(text: str) -> str:
    """A name out of a file must not steer the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _hint(path: Path) -> str:
    if path.name.endswith(PART):
        return f"; a name in {PART} is a save that was cut off"
    old = path.with_name(path.name + OLD) if path.name else path
    return f"; the one before it is {str(old)!r}" if path.name and old.exists() else ""
