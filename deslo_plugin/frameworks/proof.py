"""``deslo.json`` in a checkpoint: what it holds, of which replicas, and the length and checksum of every file."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deslo_plugin.collectives import gathered
from deslo_plugin.frameworks.state_tree import States
from deslo_plugin.strict import ConfigError

NAME, FORMAT = "deslo.json", 1
PART, OLD = ".part", ".old"  # behind the name of a checkpoint that is being written, or replaced
CHUNK = 1 << 24


@dataclass(frozen=True)
class Proof:
    """``rows`` is the topology that saved, ``steps`` the completed steps, ``groups`` the numbers of each param group that a
    resume takes over, ``names`` each name of the plain model's state dict -> the stored tensor that it names."""

    mode: str
    rows: tuple[tuple[int, ...], ...]
    steps: int
    states: States
    groups: Sequence[Mapping[str, float]]
    names: Mapping[str, str] = field(default_factory=dict)


def latest(folder: str | Path) -> Path | None:
    """The complete checkpoint with the most steps among the subfolders of ``folder``, or None: what a restart loads.

    Looks at what is there now: call it on one rank and tell the others, or before training has begun to save.
    """
    complete = [file.parent for file in Path(folder).glob(f"*/{NAME}") if not file.parent.name.endswith((PART, OLD))]
    return max(complete, key=lambda each: (read_proof(each).steps, (each / NAME).stat().st_mtime_ns), default=None)


def measured(folder: Path, world: dist.ProcessGroup | None) -> dict[str, Any]:
    """File of ``folder`` -> [bytes, CRC-32], or what went wrong, each rank a share of them. Collective."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != NAME)
    rank, size = (dist.get_rank(world), dist.get_world_size(world)) if world is not None else (0, 1)
    mine = {name: _measure(folder / name) for name in names[rank::size]}
    everyone = gathered(mine, world).values() if world is not None else [mine]
    return {name: value for each in everyone for name, value in each.items()}


def write_proof(folder: Path, proof: Proof, files: Mapping[str, Any]) -> None:
    """Writes ``deslo.json``, a checkpoint's last file."""
    content = {"format": FORMAT, "proof": asdict(proof), "files": dict(sorted(files.items()))}
    with (folder / NAME).open("w") as file:
        json.dump(content | {"crc32": _checksum(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_proof(folder: Path) -> Proof:
    """Raises ``ConfigError`` for what is no checkpoint of ours, or one that was cut off."""
    try:
        content = json.loads((folder / NAME).read_text())
        if content["format"] != FORMAT:
            raise ConfigError(f"load({str(folder)!r})", f"format {FORMAT}", str(content["format"]), "load it with the release that saved it")
        if content.pop("crc32") != _checksum(content):
            raise TypeError("its checksum is another")
        own = content["proof"]
        return Proof(own["mode"], tuple(map(tuple, own["rows"])), own["steps"], own["states"], own["groups"],
                     own.get("names", {}))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"load({str(folder)!r})", f"a folder with {NAME}", "none", "check the path: it is no checkpoint of "
                          f"deslo_plugin.save, or one that was cut off, whose name ends in {PART}") from error
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"load({str(folder)!r})", f"a {NAME} as it was written", f"{error!r}", "take another checkpoint") from error


def prove(folder: Path, world: dist.ProcessGroup | None) -> None:
    """Raises ``ConfigError`` on every rank, with a file that is not as it was saved. Collective."""
    for name, problem in damaged(folder, world).items():
        raise ConfigError(f"load({str(folder)!r})", "files as they were saved", f"{name}: {problem}", "take another checkpoint")


def damaged(folder: Path, world: dist.ProcessGroup | None) -> dict[str, str]:
    """File -> what is wrong with it, of all that ``deslo.json`` names, measured again. Collective."""
    saved, found = json.loads((folder / NAME).read_text())["files"], measured(folder, world)
    problems = {name: found.get(name, "missing") for name in saved if found.get(name) != saved[name]}
    return {name: "other bytes than were saved" if isinstance(got, list) else got for name, got in problems.items()}


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _measure(file: Path) -> list[int] | str:
    """[bytes, CRC-32], or the error of reading it."""
    crc, size = 0, 0
    try:
        with file.open("rb") as content:
            while chunk := content.read(CHUNK):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    except OSError as error:
        return str(error)
    return [size, crc]
