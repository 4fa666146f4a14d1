"""``deslo.json`` in a checkpoint: what it holds, of which replicas, and the length and checksum of every file."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from deslo_plugin.agreement import agree
from deslo_plugin.strict import ConfigError

NAME, FORMAT = "deslo.json", 1
CHUNK = 1 << 24


@dataclass(frozen=True)
class Proof:
    """``rows`` is the topology that saved, ``steps`` the completed steps, ``states`` parameter name -> its states, ``groups``
    the numbers of each param group that a resume takes over."""

    mode: str
    rows: tuple[tuple[int, ...], ...]
    steps: int
    states: Mapping[str, list[str]]
    groups: Sequence[Mapping[str, float]]


def write_proof(folder: Path, proof: Proof) -> None:
    """Measures every file of ``folder`` and writes ``deslo.json``, the last file of a checkpoint."""
    files = {str(file.relative_to(folder)): _measure(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    (folder / NAME).write_text(json.dumps({"format": FORMAT, "proof": asdict(proof), "files": files}, indent=1))


def read_proof(folder: Path) -> Proof:
    """Raises ``ConfigError`` for what is no checkpoint of ours, or one that was cut off."""
    try:
        content = json.loads((folder / NAME).read_text())
        if content["format"] != FORMAT:
            raise ConfigError(f"load({str(folder)!r})", f"format {FORMAT}", str(content["format"]), "load it with the release that saved it")
        own = content["proof"]
        return Proof(own["mode"], tuple(map(tuple, own["rows"])), own["steps"], own["states"], own["groups"])
    except FileNotFoundError as error:
        raise ConfigError(f"load({str(folder)!r})", f"a folder with {NAME}", "none", "check the path: it is no checkpoint of "
                          "deslo_plugin.save, or one that was cut off and is called .part") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"load({str(folder)!r})", f"a {NAME} as it was written", f"{error!r}", "take another checkpoint") from error


def prove(folder: Path, world: dist.ProcessGroup | None) -> None:
    """Measures every file again, each rank its share; raises ``ConfigError`` on every rank that names a file that differs."""
    files = json.loads((folder / NAME).read_text())["files"]
    rank, size = (dist.get_rank(world), dist.get_world_size(world)) if world is not None else (0, 1)
    problem = ""
    for name in sorted(files)[rank::size]:
        found = _measure(folder / name) if (folder / name).is_file() else None
        if found != files[name]:
            problem = f"{name}: {'missing' if found is None else 'other bytes than were saved'}"
            break
    if world is not None:
        agree(f"load({str(folder)!r}) files", {"whole": problem or "yes"}, do="take another checkpoint", group=world)
    if problem:
        raise ConfigError(f"load({str(folder)!r})", "files as they were saved", problem, "take another checkpoint")


def _measure(file: Path) -> list[int]:
    """[bytes, CRC-32]."""
    crc, size = 0, 0
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [size, crc]
