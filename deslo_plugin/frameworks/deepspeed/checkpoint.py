"""``engine.save_checkpoint`` and its kin, for an engine whose replicas differ: what they save is a ``deslo_plugin``
checkpoint."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from deslo_plugin.checkpoint.export import averaged_state_dict
from deslo_plugin.checkpoint.folder import found, write_whole
from deslo_plugin.checkpoint.load_averaged import READ
from deslo_plugin.checkpoint.location import location, make_folder
from deslo_plugin.checkpoint.manifest import NAME
from deslo_plugin.checkpoint.model_names import saved_state
from deslo_plugin.checkpoint.save_load import load, save
from deslo_plugin.checkpoint.state_dict_guard import refuse_one_replica
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.deepspeed.export import whole_of
from deslo_plugin.log import log_rank0

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"


def install_checkpoint_methods(engine: DeepSpeedEngine) -> None:
    """Gives ``engine`` checkpoints by ``deslo.checkpoint_mode`` in ``<save_dir>/<tag>``, and exports of the averaged
    model."""
    load_native = engine.load_checkpoint

    def save_checkpoint(
        save_dir: str,
        tag: Any = None,
        client_state: Mapping[str, Any] = {},
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As DeepSpeed's; frozen parameters are always saved, and ``client_state`` is plain values."""
        tag = str(tag if tag is not None else f"global_step{engine.global_steps}")
        folder = all_or_none(lambda: location(save_dir), dist.group.WORLD)
        save(folder / tag, engine, extra=client_state)

        def finish() -> None:
            if dist.get_rank() == 0:
                write_whole(folder / RECOVERY, lambda file: file.write(SCRIPT.encode()))
                if save_latest:
                    write_whole(folder / LATEST, lambda file: file.write(tag.encode()))

        all_or_none(finish, dist.group.WORLD)
        return True

    @functools.wraps(load_native)
    def load_checkpoint(load_dir: str, tag: Any = None, **options: Any) -> tuple[str | None, Any]:
        inside = all_or_none(lambda: location(load_dir), dist.group.WORLD, READ)
        latest = inside / (LATEST_UNIVERSAL if engine.load_universal_checkpoint() else LATEST)
        if tag is None:
            tag = all_or_none(lambda: latest.read_text().strip() if latest.is_file() else None, dist.group.WORLD, READ)
        check_same_on_all_ranks("load_checkpoint", {"tag": tag}, do="give every rank the same folder and tag")
        if tag is None:
            log_rank0(f"deslo: {latest} is not there, nothing was loaded", logging.WARNING)
            return None, None
        folder = inside / str(tag)
        own = all_or_none(lambda: (found(folder) / NAME).is_file(), dist.group.WORLD, READ)
        if not own and options.get("load_module_only"):
            log_rank0(f"deslo: {folder} is DeepSpeed's own: every replica begins with its weights")
            return load_native(load_dir, tag, **options)
        if engine.lr_scheduler is None:  # Lightning has taken it out, and asks for the rest
            options.pop("load_lr_scheduler_states", None)
        partly = [name for name, value in options.items() if value not in (None, name in ALL)]
        if partly:
            raise ConfigError(
                f"load_checkpoint({', '.join(partly)})",
                "the whole state",
                "a part of it",
                "remove it; for weights alone, load deslo_plugin.load_averaged_state_dict(folder) into the model",
            )
        return str(folder), load(folder, engine)

    def save_16bit_model(
        save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        state = averaged_16bit_state_dict(exclude_frozen_parameters)

        def write() -> None:
            if dist.get_rank() == 0:
                folder = location(save_dir)
                make_folder(folder)
                write_whole(folder / save_filename, lambda file: torch.save(state, file))

        all_or_none(write, dist.group.WORLD)
        return True

    def averaged_16bit_state_dict(exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        log_rank0("deslo: exporting the average of all replicas")
        frozen = {
            name
            for name, value in saved_state(engine.module).items()
            if isinstance(value, nn.Parameter) and not value.requires_grad
        }
        state = averaged_state_dict(engine, as_trained=True)
        return {name: value for name, value in state.items() if not (exclude_frozen_parameters and name in frozen)}

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    if engine.deslo.topology.replicas > 1:
        engine.save_16bit_model = engine.save_fp16_model = save_16bit_model
        engine._zero3_consolidated_16bit_state_dict = averaged_16bit_state_dict
        refuse_one_replica(engine.deslo, engine.module, gather=whole_of(engine))


ALL = ("load_module_strict", "load_optimizer_states", "load_lr_scheduler_states")  # True by default

RECOVERY = "zero_to_fp32.py"  # the script that DeepSpeed puts there finds nothing in folders of ours
SCRIPT = '''"""Writes the float32 weights of a deslo_plugin checkpoint.

python zero_to_fp32.py CHECKPOINT_MODES OUTPUT [-t TAG]
"""

import argparse
from pathlib import Path

import torch

from deslo_plugin import latest_checkpoint, load_averaged_state_dict

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoint_dir", type=Path)
parser.add_argument("output", type=Path, help="a file, or a folder for pytorch_model.bin")
parser.add_argument("-t", "--tag", help="by default the latest")
given = parser.parse_args()
newest = latest_checkpoint(given.checkpoint_dir) or given.checkpoint_dir
folder = given.checkpoint_dir / given.tag if given.tag else newest
file = given.output if given.output.suffix else given.output / "pytorch_model.bin"
file.parent.mkdir(parents=True, exist_ok=True)
torch.save(load_averaged_state_dict(folder), file)
print(f"wrote {file}: the weights of {folder}")
'''
