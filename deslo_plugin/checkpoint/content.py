"""All that one checkpoint will hold, in memory, and its way into files: nothing here asks the model any more."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deslo_plugin.checkpoint.folder import Destination
from deslo_plugin.checkpoint.host_copy import host_copy
from deslo_plugin.checkpoint.index import write_tree
from deslo_plugin.checkpoint.manifest import Manifest, expect_file_checksums, file_checksums, write_manifest
from deslo_plugin.checkpoint.plain_values import write_plain
from deslo_plugin.checkpoint.tree_agreement import Tree
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.comm.process_groups import Groups
from deslo_plugin.log import log_rank0

FIRST = "first_rank.pt"


@dataclass(frozen=True)
class Content:
    """For ``to``: this rank's ``tree``, of which all but ``means`` are live tensors; what it keeps
    beside, or None; and the manifest, which lacks the files. ``strong``: whether each of these gets a SHA-256."""

    to: Destination
    tree: Tree
    means: Set[str]
    own: Mapping[str, Any] | None
    proof: Manifest
    strong: bool

    def copied(self) -> "Content":
        """The same, of which training changes nothing; see ``host_copy``."""
        tree = {name: value if name in self.means else host_copy(value) for name, value in self.tree.items()}
        return replace(self, tree=tree, own=host_copy(self.own))

    def write(self, groups: Groups, when: Callable[[], object] | None = None) -> None:
        """Writes the folder that was begun, and puts it in its place. Collective over ``groups``. ``when``: waits for
        the tensors of a copy to have come to the host. Raises ``OSError`` on every rank if any rank cannot write."""
        world, part = groups.world, self.to.part
        first = groups.topology.rank == min(groups.topology.ranks)
        where, name, group = place(part, self.proof.mode, groups)
        if when is not None:
            all_or_none(when, world)

        def write() -> None:
            write_tree(self.tree, where, group, on_host=when is not None)
            if self.own is not None:
                write_plain(self.own, where / name)

        all_or_none(write, world)
        files = expect_file_checksums(file_checksums(part, world, strong=self.strong))
        proof = replace(self.proof, files=files)
        sha256 = all_or_none(lambda: write_manifest(part, proof) if first else None, world)
        all_or_none(lambda: self.to.put_in_place() if first else None, world)
        if self.strong:
            log_rank0(
                f"deslo: saved {self.to.final}; the SHA-256 of its deslo.json is {sha256}: keep it elsewhere, and "
                "load(path, model, sha256=...) refuses any other"
            )


def place(folder: Path, mode: str, groups: Groups) -> tuple[Path, str, dist.ProcessGroup | None]:
    """Where a rank's part goes, the file of what else it keeps, and with whom it writes one state."""
    if mode == "per_replica":
        topology = groups.topology
        return folder / f"replica_{topology.replica}", f"rank_{topology.rank}.pt", groups.shard
    return folder, FIRST, groups.world
