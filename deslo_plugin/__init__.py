"""Desynchronised local updates for data-parallel training: DES-LOC and MT-DAO as one torch optimizer.

Importing this package is all that a DeepSpeed script needs: from then on a DeepSpeed JSON may say
``"optimizer": {"type": "DesLoc", ...}`` and ``"deslo": {...}``.
"""

from typing import Any

from deslo_plugin.frameworks.versions import expect

expect("torch")  # before what an older one lacks is asked for

from deslo_plugin.averaging.synchronizer import NonFiniteError
from deslo_plugin.checkpoint.averaged_weights import averaged_weights
from deslo_plugin.checkpoint.export import averaged_state_dict
from deslo_plugin.checkpoint.load_averaged import saved_state_dict
from deslo_plugin.checkpoint.manifest import latest
from deslo_plugin.checkpoint.preemption import Preemption
from deslo_plugin.checkpoint.save_load import load, save
from deslo_plugin.checkpoint.state_dict_guard import one_replica
from deslo_plugin.checkpoint.sync_replicas import meet
from deslo_plugin.comm.transport import AverageError
from deslo_plugin.config.load import load_config
from deslo_plugin.config.reader import ConfigError
from deslo_plugin.frameworks.attach import attach
from deslo_plugin.frameworks.import_hooks import on_import
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.version import __version__

__all__ = [
    "AverageError",
    "ConfigError",
    "DesLoc",
    "NonFiniteError",
    "Preemption",
    "__version__",
    "attach",
    "attach_accelerator",
    "averaged_state_dict",
    "averaged_weights",
    "latest",
    "load",
    "load_config",
    "meet",
    "one_replica",
    "save",
    "saved_state_dict",
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


on_import("deepspeed", _teach_deepspeed)
on_import("accelerate", _teach_accelerate)
