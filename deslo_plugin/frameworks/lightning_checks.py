"""What a Lightning Trainer may have around a callback of ours: refused before its strategy has set up anything."""

from typing import Any

import torch.distributed as dist

from deslo_plugin.attachment import attached_to
from deslo_plugin.errors import ConfigError

DDP, DEEPSPEED, MODEL_PARALLEL, SINGLE_DEVICE = (
    "DDPStrategy",
    "DeepSpeedStrategy",
    "ModelParallelStrategy",
    "SingleDeviceStrategy",
)
KNOWN = (DDP, DEEPSPEED, MODEL_PARALLEL, SINGLE_DEVICE)
REFUSED = {  # a strategy that is, or derives from a known one but does something else -> what to do
    "FSDPStrategy": (
        "use ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1), with fully_shard over the ranks "
        "of one replica in configure_model: docs/lightning.md"
    ),
    "XLAStrategy": "use DDPStrategy on GPUs or CPUs: XLA reduces gradients by itself",
    "SingleDeviceXLAStrategy": "use SingleDeviceStrategy on a GPU or CPU",
}
OWN_AVERAGES = {  # of DDPStrategy -> whatever goes over all ranks, or averages replicas, by itself
    "_ddp_comm_hook": "ddp_comm_hook",
    "_ddp_comm_state": "ddp_comm_state",
    "_ddp_comm_wrapper": "ddp_comm_wrapper",
    "_model_averaging_period": "model_averaging_period",
}
MOVING_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")  # and EMAWeightAveraging, which is one


def kind_of(strategy: Any) -> str:
    """Which of ``KNOWN`` ``strategy`` is or derives from. Raises ``ConfigError`` for any other."""
    for name in _names(strategy):
        if name in KNOWN:
            return name
        if name in REFUSED:
            raise _unknown(strategy, REFUSED[name])
    raise _unknown(
        strategy,
        'use strategy="ddp"; or call deslo_plugin.attach(model, optimizer) yourself once it has wrapped the module, if '
        "it leaves gradients to DDP or fully_shard",
    )


def refuse(trainer: Any, module: Any, config: Any, replicate: str | None) -> None:
    """Raises ``ConfigError`` for a Trainer that would send something over the slow link at every step, or save one
    replica for the model. No collective: it depends on what every rank was given alike."""
    kind = kind_of(trainer.strategy)
    for attribute, name in OWN_AVERAGES.items():
        if getattr(trainer.strategy, attribute, None) is not None:
            raise ConfigError(
                f"DDPStrategy({name}=...)", "none", "one", "remove it: gradients stay inside a replica by our own hook"
            )
    if kind == SINGLE_DEVICE and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            "SingleDeviceStrategy", "one process", f"a world of {dist.get_world_size()}", 'use strategy="ddp"'
        )
    if replicate is not None and kind != MODEL_PARALLEL:
        raise ConfigError("DesLocCallback(replicate=...)", "none beside a " + kind, repr(replicate), "remove it")
    if config is not None and kind == DEEPSPEED:
        raise ConfigError(
            "DesLocCallback(config)",
            "none beside a DeepSpeedStrategy, whose JSON has the two blocks",
            "one",
            'write them in DeepSpeedStrategy(config={..., "optimizer": ..., "deslo": ...})',
        )
    for callback in trainer.callbacks:
        if set(MOVING_AVERAGES) & set(_names(callback)):
            raise ConfigError(
                "Trainer(callbacks=...)",
                "none that keeps a moving average, which is one replica's own, and saves it for the model",
                type(callback).__name__,
                "remove it; averages of replicas are a moving average already",
            )
    ours = [callback for callback in trainer.callbacks if "DesLocCallback" in _names(callback)]
    if len(ours) > 1:
        raise ConfigError("Trainer(callbacks=...)", "one DesLocCallback", str(len(ours)), "keep one")
    if attached_to(module):
        raise ConfigError(
            "Trainer.fit(module)",
            "a module that was not fitted with a DesLocCallback before",
            "one whose earlier optimizers are still attached",
            "make a new module, and module.load_state_dict(earlier.state_dict()) if it should go on from it",
        )


def refuse_own_replicas(checkpoint_mode: str) -> None:
    """Raises ``ConfigError`` for a mode that Lightning's one file cannot hold."""
    if checkpoint_mode == "per_replica":
        raise ConfigError(
            "deslo.checkpoint_mode",
            '"averaged" or "synchronized" under Lightning, whose checkpoint is one model',
            '"per_replica"',
            'change it; deslo_plugin.save(path, module, mode="per_replica"), on every rank, saves every replica',
        )


def _names(value: Any) -> list[str]:
    return [kind.__name__ for kind in type(value).__mro__]


def _unknown(strategy: Any, do: str) -> ConfigError:
    return ConfigError("Trainer(strategy=...)", f"one of {', '.join(KNOWN)}", type(strategy).__name__, do)
