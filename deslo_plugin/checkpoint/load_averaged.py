"""The model out of a checkpoint, in one process, without the model or replicas."""

from pathlib import Path

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.checkpoint.folder import found
from deslo_plugin.checkpoint.index import read_index, read_tree, tensors_of
from deslo_plugin.checkpoint.manifest import read_manifest, verify
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.errors import ConfigError

READ = "see and read"


def load_averaged_state_dict(path: str | Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The model's state dict out of a checkpoint, on the CPU: in one process, without the model or replicas.

    It has the names that ``state_dict()`` of the plain model gave, in their order, each name of a shared tensor among
    them.

    Nothing in the files runs; ``sha256`` as for ``load``. Raises ``ConfigError`` for a folder that is torn, altered or
    foreign, and for the replicas of an "per_replica" checkpoint.
    """
    folder = found(path)
    proof = read_manifest(folder, sha256)
    if proof.mode == "per_replica":
        raise ConfigError(
            f"load_averaged_state_dict({str(folder)!r})",
            "one model",
            'every replica\'s own, saved with mode "per_replica"',
            'load it and save with mode "averaged"',
        )
    verify(folder, proof, None)
    index = read_index(folder)
    stored = tensors_of(index)
    names = [name for name in stored if name.startswith((f"{PARAMS}/", "buffers/"))]
    state = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    all_or_none(lambda: read_tree(state, folder, index, None, alone=True), None, READ)
    absent = [stored for stored in proof.names.values() if stored not in state]
    if absent:
        raise ConfigError(
            f"load_averaged_state_dict({str(folder)!r})",
            "the tensors that deslo.json names",
            f"none of {absent[0]!r}",
            "take another checkpoint",
        )
    return {name: state[stored] for name, stored in proof.names.items()}
