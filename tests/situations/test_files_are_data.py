"""Folders made by somebody else: what is inspected or loaded is data, and nothing in it runs."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import deslo_plugin
from deslo_plugin.checkpoint.manifest import file_checksums, read_manifest, write_manifest
from deslo_plugin.cli.app import app
from deslo_plugin.errors import ConfigError
from tests.support.checkpoint_configs import saved
from tests.support.checkpoint_jobs import alone


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def sealed(folder: Path) -> None:
    """With the checksums of what is there now, as anybody can make them."""
    from dataclasses import replace

    write_manifest(folder, replace(read_manifest(folder), files=file_checksums(folder, None)))


def index_of(folder: Path) -> Path:
    return next(folder.rglob("index.json"))


def in_the_index_of_dcp(folder: Path, evil: Runs) -> None:
    next(folder.rglob(".metadata")).write_bytes(pickle.dumps(evil))


def in_our_index(folder: Path, evil: Runs) -> None:
    index_of(folder).write_bytes(pickle.dumps(evil))


def beside_the_tree(folder: Path, evil: Runs) -> None:
    torch.save(evil, next(folder.rglob("*_*.pt")))


def beside_the_tree_plainly(folder: Path, evil: Runs) -> None:
    next(folder.rglob("*_*.pt")).write_bytes(pickle.dumps(evil))


def inside(key: str) -> Any:
    def craft(folder: Path, evil: Runs) -> None:
        file = next(folder.rglob("*_*.pt"))
        torch.save(torch.load(file, weights_only=True) | {key: evil}, file)

    craft.__name__ = f"as_the_{key}"
    return craft


def in_a_tensor(folder: Path, evil: Runs) -> None:
    file = next(folder.rglob("*.distcp"))
    torch.save(evil, file)
    content = json.loads(index_of(folder).read_text())
    for tensor in content["tensors"].values():
        for piece in tensor["pieces"]:
            piece[2:] = [file.name, 0, file.stat().st_size]
    index_of(folder).write_text(json.dumps(content))


def as_a_number(folder: Path, evil: Runs) -> None:
    """Where a stock optimizer's clock would be."""
    torch.save(evil, index_of(folder).parent / "__9_0.distcp")
    content = json.loads(index_of(folder).read_text())
    for name in content["tensors"]:
        content["values"][name] = ["__9_0.distcp", 0, (index_of(folder).parent / "__9_0.distcp").stat().st_size]
    index_of(folder).write_text(json.dumps(content | {"tensors": {}}))


CRAFTS = [
    in_the_index_of_dcp,
    in_our_index,
    beside_the_tree,
    beside_the_tree_plainly,
    in_a_tensor,
    as_a_number,
    *map(inside, ("extra", "aside", "random", "averaging")),
]


@pytest.mark.parametrize("mode", ["averaged", "per_replica"])
@pytest.mark.parametrize("craft", CRAFTS, ids=lambda craft: craft.__name__)
def test_nothing_in_a_crafted_folder_runs(tmp_path, mode, craft):
    folder, marker = saved(tmp_path / "runs" / "step_1", mode), tmp_path / "it ran"
    craft(folder, Runs(marker))
    sealed(folder)
    told = CliRunner().invoke(app, ["ckpt", "inspect", str(folder)])
    assert told.exception is None or isinstance(told.exception, SystemExit)
    assert CliRunner().invoke(app, ["ckpt", "inspect", str(folder.parent)]).exit_code == told.exit_code
    assert deslo_plugin.latest_checkpoint(folder.parent) == folder
    model, _ = alone()
    if craft is in_the_index_of_dcp:  # nobody reads that
        assert deslo_plugin.load(folder, model) == {"batch": 3}
    else:
        with pytest.raises((ConfigError, OSError)):
            deslo_plugin.load(folder, model)
    try:
        deslo_plugin.load_averaged_state_dict(folder)
    except (ConfigError, OSError):
        pass
    assert not marker.exists()
    pickle.loads(pickle.dumps(Runs(marker)))  # what was in there does run where it is let
    assert marker.exists()


def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path):
    folder = saved(tmp_path / "c")
    (folder / "hook.py").write_text("")
    for read in (lambda: deslo_plugin.load(folder, alone()[0]), lambda: deslo_plugin.load_averaged_state_dict(folder)):
        with pytest.raises(ConfigError, match="hook.py: not named in deslo.json; move it out"):
            read()
    assert "TORN: hook.py: not named in deslo.json" in CliRunner().invoke(app, ["ckpt", "inspect", str(folder)]).stdout


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/hostname", "a/../../outside.distcp", ""])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, name):
    folder = saved(tmp_path / "c")
    proof = read_manifest(folder)
    write_manifest(folder, type(proof)(**{**vars(proof), "files": {**proof.files, name: [1, 2]}}))
    with pytest.raises(ConfigError, match="expected files inside the folder"):
        deslo_plugin.load(folder, alone()[0])


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path):
    folder = saved(tmp_path / "c")
    index_of(folder).write_text(index_of(folder).read_text().replace("__0_0.distcp", "../__0_0.distcp"))
    sealed(folder)
    with pytest.raises(ConfigError, match="index of tensors as it was written"):
        deslo_plugin.load(folder, alone()[0])


def test_links_are_refused(tmp_path):
    folder, other = saved(tmp_path / "c"), saved(tmp_path / "other")
    for name in ("__0_0.distcp", "first_rank.pt"):
        (folder / name).unlink()
        (folder / name).symlink_to(other / name)
        with pytest.raises(ConfigError, match=f"{name}: a link, or no file at all"):
            deslo_plugin.load(folder, alone()[0])
        (folder / name).unlink()
        shutil.copy(other / name, folder / name)
    exact = saved(tmp_path / "per_replica", "per_replica")
    (exact / "replica_0").rename(tmp_path / "elsewhere")
    (exact / "replica_0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="replica_0"):
        deslo_plugin.load(exact, alone()[0])


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)


def test_a_kept_sha256_finds_what_a_checksum_made_anew_hides(tmp_path, caplog):
    with caplog.at_level("INFO", logger="deslo_plugin"):
        folder = saved(tmp_path / "c", digest="sha256")
    told = json.loads(CliRunner().invoke(app, ["ckpt", "inspect", str(folder), "--json"]).stdout)
    kept = told["sha256"]
    assert told["digest"] == "sha256" and told["whole"]
    assert deslo_plugin.load(folder, alone()[0], sha256=kept) == {"batch": 3}
    changed(folder / "first_rank.pt")
    with pytest.raises(ConfigError, match="first_rank.pt: other bytes than were saved"):
        deslo_plugin.load(folder, alone()[0], sha256=kept)
    sealed(folder)
    for read in (
        lambda: deslo_plugin.load(folder, alone()[0], sha256=kept),
        lambda: deslo_plugin.load_averaged_state_dict(folder, sha256=kept),
    ):
        with pytest.raises(ConfigError, match=f"a deslo.json with SHA-256 {kept}, got .*somebody has changed it"):
            read()
    weak = saved(tmp_path / "weak")
    with pytest.raises(ConfigError, match="a SHA-256 of every file, got CRC-32 alone"):
        deslo_plugin.load(weak, alone()[0], sha256=read_manifest(weak).digest)
