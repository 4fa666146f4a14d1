"""``deslo.json`` in a checkpoint: what it holds, of which replicas, and the length and checksum of every file.

A CRC-32 finds what went wrong by accident. Whoever can write to the folder can make it anew; SHA-256, where it was
asked for, leaves him ``deslo.json`` alone to forge, whose own SHA-256 ``load`` compares with one that was kept
elsewhere."""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.algorithm.switch import Switch, saved
from deslo_plugin.checkpoint.foreign import what_is_there
from deslo_plugin.checkpoint.location import files_under, flush
from deslo_plugin.checkpoint.tree_agreement import States
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.config.schema import CHECKPOINT_MODES
from deslo_plugin.errors import ConfigError

NAME, FORMAT = "deslo.json", 2
PART, OLD = ".part", ".old"  # behind the name of a checkpoint that is being written, or replaced
CHUNK = 1 << 24

Files = Mapping[str, Sequence[Any]]
"""Name in the folder -> bytes, CRC-32, and SHA-256 where it was asked for."""


@dataclass(frozen=True)
class Manifest:
    """``rows`` is the topology that saved, ``steps`` the completed steps, ``groups`` the numbers of each param group
    that a resume takes over, ``names`` each name of the plain model's state dict -> the stored tensor that it names,
    ``switch`` that of the run's config.
    ``digest`` is the SHA-256 of ``deslo.json`` itself."""

    mode: str
    rows: tuple[tuple[int, ...], ...]
    steps: int
    states: States
    groups: Sequence[Mapping[str, float]]
    names: Mapping[str, str] = field(default_factory=dict)
    switch: Switch | None = None
    files: Files = field(default_factory=dict)
    digest: str = ""

    @property
    def strong(self) -> bool:
        """Whether every file has its SHA-256."""
        return bool(self.files) and all(len(measures) == 3 for measures in self.files.values())


def file_checksums(folder: Path, world: dist.ProcessGroup | None, *, strong: bool = False) -> dict[str, Any]:
    """File of ``folder`` -> [bytes, CRC-32], with SHA-256 if ``strong``, or the error of reading it; each rank a share
    of them.

    Collective. Raises ``OSError`` on every rank where one cannot list them.
    """
    names = all_or_none(lambda: _listed(folder), world, "see and read")
    rank, size = (dist.get_rank(world), dist.get_world_size(world)) if world is not None else (0, 1)
    if world is not None:  # what another has just written may not show everywhere yet
        names = sorted({name for each in all_gather_by_rank(names, world).values() for name in each})
    mine = {name: _measure(folder / name, strong) for name in names[rank::size]}
    everyone = all_gather_by_rank(mine, world).values() if world is not None else [mine]
    return {name: value for each in everyone for name, value in each.items()}


def expect_file_checksums(files: Mapping[str, Any]) -> Files:
    """Raises ``OSError`` for a file that could not be read."""
    for name, measures in files.items():
        if isinstance(measures, str):
            raise OSError(
                f"checkpoint: {name}: {measures}; expected a folder in which every rank can read what others wrote"
            )
    return files


def write_manifest(folder: Path, proof: Manifest) -> str:
    """Writes ``deslo.json``, a checkpoint's last file, and returns its SHA-256."""
    own = {name: getattr(proof, name) for name in ("mode", "rows", "steps", "states", "groups", "names")}
    own["switch"] = proof.switch and proof.switch.as_dict()
    content = {"format": FORMAT, "proof": own, "files": dict(sorted(proof.files.items()))}
    text = json.dumps(content | {"crc32": _checksum(content)}, indent=1).encode()
    with (folder / NAME).open("wb") as file:
        file.write(text)
        flush(file)
    return hashlib.sha256(text).hexdigest()


def read_manifest(folder: Path, sha256: str | None = None) -> Manifest:
    """Raises ``ConfigError`` for what is no checkpoint of ours, one that was cut off, and one that has another
    ``sha256`` than was kept of it."""
    where = f"load({str(folder)!r})"
    try:
        text = (folder / NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(where, f"a folder with {NAME}", *what_is_there(folder)) from error
    digest = hashlib.sha256(text).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise ConfigError(
            f"load({str(folder)!r}, sha256=...)",
            f"a {NAME} with SHA-256 {sha256}",
            digest,
            "do not use it: it is another checkpoint, or somebody has changed it",
        )
    try:
        proof = _parsed(json.loads(text), where, digest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(where, f"a {NAME} as it was written", f"{error!r}", "take another checkpoint") from error
    if sha256 is not None and not proof.strong:
        raise ConfigError(
            f"load({str(folder)!r}, sha256=...)",
            "a SHA-256 of every file",
            "CRC-32 alone",
            'save with "deslo": {"checkpoint_digest": "sha256"}, or leave sha256 out',
        )
    return proof


def verify(folder: Path, proof: Manifest, world: dist.ProcessGroup | None) -> None:
    """Raises ``ConfigError`` on every rank, with a file that is not as it was saved. Collective."""
    for name, problem in corrupted_files(folder, proof, world).items():
        do = "move it out" if problem == UNNAMED else "take another checkpoint"
        raise ConfigError(f"load({str(folder)!r})", "files as they were saved", f"{name}: {problem}", do)


UNNAMED = f"not named in {NAME}"


def corrupted_files(folder: Path, proof: Manifest, world: dist.ProcessGroup | None) -> dict[str, str]:
    """File -> what is wrong with it, of all that ``deslo.json`` names, measured again, and of all that it does not.
    Collective."""
    found, problems = file_checksums(folder, world, strong=proof.strong), {}
    for name in proof.files:
        if name not in found:
            problems[name] = "missing"
        elif found[name] != list(proof.files[name]):
            problems[name] = found[name] if isinstance(found[name], str) else "other bytes than were saved"
    return problems | {name: UNNAMED for name in found if name not in proof.files}


def _parsed(content: Any, where: str, digest: str) -> Manifest:
    if content["format"] != FORMAT:
        raise ConfigError(where, f"format {FORMAT}", str(content["format"]), "load it with the release that saved it")
    if content.pop("crc32") != _checksum(content):
        raise TypeError("its checksum is another")
    own, files = content["proof"], content["files"]
    proof = Manifest(
        own["mode"],
        tuple(map(tuple, own["rows"])),
        own["steps"],
        own["states"],
        own["groups"],
        own["names"],
        saved(own.get("switch")),  # none before there was one
        files,
        digest,
    )
    numbers = [
        *(rank for row in proof.rows for rank in row),
        proof.steps,
        *(size for states in proof.states.values() for shape in states.values() for size in shape or ()),
    ]
    if proof.mode not in CHECKPOINT_MODES or not all(proof.rows) or not all(type(number) is int for number in numbers):
        raise TypeError("a mode, rows, steps or shapes that are none")
    if not all(type(each) is str for each in proof.names.values()):
        raise TypeError("names of other things than tensors")
    if not all(PARAMS in states for states in proof.states.values()):
        raise TypeError("states without a parameter")
    if not all(type(value) in (int, float) for group in proof.groups for value in group.values()):
        raise TypeError("a param group of other things than numbers")
    for name, (size, crc, *sha) in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not name or "\\" in name:
            raise ConfigError(
                where, "files inside the folder", f"{name!r} in {NAME}", "do not use it: no save writes that"
            )
        if type(size) is not int or type(crc) is not int or not all(type(each) is str for each in sha) or len(sha) > 1:
            raise TypeError(f"measures of {name!r}")
    return proof


def _listed(folder: Path) -> list[str]:
    return [name for name in files_under(folder) if name != NAME]


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _measure(file: Path, strong: bool) -> list[Any] | str:
    """[bytes, CRC-32, SHA-256 if ``strong``], or why it cannot be read, or must not."""
    crc, size, sha = 0, 0, hashlib.sha256()
    try:
        if file.is_symlink() or not file.is_file():
            return "a link, or no file at all" if file.is_symlink() or file.exists() else "missing"
        with file.open("rb") as content:
            while chunk := content.read(CHUNK):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
                if strong:
                    sha.update(chunk)
    except Exception as error:  # other ranks wait for an answer, and a store's package raises what it likes
        return str(error) if isinstance(error, OSError) else repr(error)
    return [size, crc, *([sha.hexdigest()] if strong else [])]
