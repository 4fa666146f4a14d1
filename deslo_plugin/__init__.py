"""Desynchronised local updates for data-parallel training: DES-LOC and MT-DAO as one torch optimizer.

Importing this package is all that a DeepSpeed script needs: from then on a DeepSpeed JSON may say
``"optimizer": {"type": "DesLoc", ...}`` and ``"deslo": {...}``.
"""

from typing import TYPE_CHECKING, Any

from deslo_plugin.frameworks.versions import expect

expect("torch")  # before what an older one lacks is asked for

from deslo_plugin.checkpoint.averaged_weights import averaged_weights
from deslo_plugin.checkpoint.deepspeed_layout import export_deepspeed
from deslo_plugin.checkpoint.export import averaged_state_dict
from deslo_plugin.checkpoint.folder import latest_checkpoint
from deslo_plugin.checkpoint.load_averaged import load_averaged_state_dict
from deslo_plugin.checkpoint.pending_save import PendingSave
from deslo_plugin.checkpoint.preemption import Preemption
from deslo_plugin.checkpoint.save_load import load, save
from deslo_plugin.checkpoint.state_dict_guard import local_state_dict
from deslo_plugin.checkpoint.sync_replicas import sync_replicas
from deslo_plugin.comm.transport import SingleReplica
from deslo_plugin.config.load import load_config
from deslo_plugin.errors import AverageError, ConfigError, NonFiniteError
from deslo_plugin.frameworks.attach import attach
from deslo_plugin.frameworks.clip_grad_norm import clip_grad_norm_
from deslo_plugin.frameworks.import_hooks import on_import
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.renamed import FUNCTIONS, explain, explain_moved_modules
from deslo_plugin.version import __version__

__all__ = [
    "AverageBeforeSave",
    "AverageError",
    "ConfigError",
    "DesLoc",
    "NonFiniteError",
    "PendingSave",
    "Preemption",
    "SingleReplica",
    "__version__",
    "attach",
    "attach_accelerator",
    "averaged_state_dict",
    "averaged_weights",
    "clip_grad_norm_",
    "export_deepspeed",
    "latest_checkpoint",
    "load",
    "load_averaged_state_dict",
    "load_config",
    "local_state_dict",
    "save",
    "sync_replicas",
]


def attach_accelerator(accelerator: Any, config: Any = None, **options: Any) -> None:
    """``attach`` for what an Accelerator has prepared or will prepare; see ``frameworks.accelerate``."""
    from deslo_plugin.frameworks.accelerate import attach_accelerator

    attach_accelerator(accelerator, config, **options)


def _teach_deepspeed() -> None:
    from deslo_plugin.frameworks.deepspeed import install

    install()


def _teach_accelerate() -> None:
    from deslo_plugin.frameworks.accelerate import install

    install()


if TYPE_CHECKING:  # a function that takes any name would hide a wrong one
    from deslo_plugin.frameworks.hf_trainer import AverageBeforeSave
else:

    def __getattr__(name: str) -> Any:
        if name == "AverageBeforeSave":  # needs transformers, which few have
            from deslo_plugin.frameworks.hf_trainer import AverageBeforeSave

            return AverageBeforeSave
        raise explain("deslo_plugin", name, FUNCTIONS)


explain_moved_modules()
on_import("deepspeed", _teach_deepspeed)
on_import("accelerate", _teach_accelerate)
