"""Lightning: one callback of its Trainer, under DDP, FSDP2, DeepSpeed and in one process."""

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from deslo_plugin.attachment import Attachment, attached_to
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.checkpoint.averaged_weights import averaged_weights
from deslo_plugin.checkpoint.state_dict_guard import local_state_dict, state_dict_as
from deslo_plugin.checkpoint.sync_replicas import sync_replicas
from deslo_plugin.checks.module_wrappers import reducers
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.attach import attach
from deslo_plugin.frameworks.lightning_checks import DDP, DEEPSPEED, kind_of, refuse, refuse_own_replicas
from deslo_plugin.frameworks.telemetry_sinks import add_scalars
from deslo_plugin.frameworks.versions import expect
from deslo_plugin.optim.desloc import DesLoc

expect("lightning")


class DesLocCallback(Callback):
    """Connects what a Trainer fits to its replicas: ``attach`` for Lightning, once the strategy has wrapped the module.

        trainer = Trainer(strategy="ddp", callbacks=[DesLocCallback("deslo.yaml")])

    ``Trainer.save_checkpoint``, which ``ModelCheckpoint`` calls, saves one model: by ``deslo.checkpoint_mode``
    "averaged" the average of all replicas, which train on as they were, by "synchronized" what they are once they have
    been averaged in place. When training ends the replicas are averaged in place.

    Args:
        config: as for ``attach``, for what ``configure_optimizers`` returns; leave it out for a ``DesLoc``, which has
            its own, and under DeepSpeed, whose JSON has the blocks.
        replicate: under ``ModelParallelStrategy``, which dimension of its ``device_mesh`` runs across replicas; without
            it the way in which ``configure_model`` has sharded the module tells.
        validate_average: whether validation sees the average of all replicas in place of this replica's own weights,
            which sends the parameters once for each validation.
        on_average: called with a ``SyncEvent`` after every average.

    Loggers of the Trainer get the scalars of every step with an average, by completed steps. Raises ``ConfigError`` on
    every rank, before the first step, for a strategy or a callback that would send something over the slow link at
    every step, or save one replica for the model."""

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | Path | None = None,
        *,
        replicate: str | None = None,
        validate_average: bool = True,
        on_average: Callable[[SyncEvent], object] | None = None,
    ):
        self.config, self.replicate, self.validate_average = config, replicate, validate_average
        self.on_average = on_average
        self.attachments: list[Attachment] = []
        """One for each optimizer, from ``on_fit_start`` on."""
        self._validation = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be attached, before the strategy has wrapped anything."""
        if stage == "fit":
            refuse(trainer, pl_module, self.config, self.replicate)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches. Lightning loads a checkpoint to resume from right after this: into attached optimizers."""
        self.attachments = self._attach(trainer)
        if not self._engine:
            refuse_own_replicas(self.attachments[0].config.deslo.checkpoint_mode)
        _save_one_model(trainer, self.attachments)
        if trainer.is_global_zero:
            for each in self.attachments:
                add_scalars(each, functools.partial(_to_loggers, trainer))

    def _attach(self, trainer: Trainer) -> list[Attachment]:
        model: Any = trainer.strategy.model
        if kind_of(trainer.strategy) == DEEPSPEED:
            if not attached_to(model):
                raise ConfigError(
                    "DeepSpeedStrategy(config=...)",
                    'a "deslo" block, and an "optimizer" block or a configure_optimizers of a stock optimizer',
                    "none",
                    "add it to the JSON",
                )
            return attached_to(model)
        if kind_of(trainer.strategy) == DDP and not reducers(model):
            raise ConfigError(
                "Trainer(strategy=...)",
                "a DDPStrategy that wraps the module in DistributedDataParallel",
                f"{type(trainer.strategy).__name__}, which does not",
                'use strategy="ddp"',
            )
        mesh = trainer.strategy.device_mesh if self.replicate is not None else None
        return [
            attach(model, optimizer, self.config, mesh=mesh, replicate=self.replicate, on_average=self.on_average)
            for optimizer in trainer.strategy.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes counters back to the host, which Lightning moves to the device with all that it has loaded."""
        for each in self.attachments:
            if isinstance(each.optimizer, DesLoc):
                for state in each.optimizer.state.values():
                    state |= {name: state[name].cpu() for name in each.optimizer.counters if name in state}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validate_average and _differ(self.attachments):
            with torch.inference_mode(False):  # what averages keep is written again in training
                self._validation.enter_context(averaged_weights(trainer.strategy.model))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False):
            self._validation.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages the replicas in place: whatever saves or tests them later has the model."""
        if _differ(self.attachments):
            sync_replicas(trainer.strategy.model)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for each in self.attachments:
            each.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the replica its own weights back, and writes what telemetry has. No collective."""
        self._validation.close()
        for each in self.attachments:
            each.close()

    @property
    def _engine(self) -> bool:
        return any(each.engine_steps for each in self.attachments)


def _differ(attachments: list[Attachment]) -> bool:
    """Whether replicas do now; the same on every rank."""
    return any(each.topology.replicas > 1 and each.averaging.diverged for each in attachments)


def _to_loggers(trainer: Trainer, scalars: Mapping[str, float], steps: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=steps)


def _save_one_model(trainer: Trainer, attachments: list[Attachment]) -> None:
    """``trainer.save_checkpoint``, which every rank calls, by ``deslo.checkpoint_mode``."""
    save, deslo = trainer.save_checkpoint, attachments[0].config.deslo

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False):
            if attachments[0].engine_steps:  # its engine saves; what Lightning asks for beside it is dropped
                with local_state_dict():
                    return save(*args, **kwargs)
            if deslo.checkpoint_mode == "synchronized" and _differ(attachments):
                sync_replicas(trainer.strategy.model)
            with state_dict_as("averaged"):
                return save(*args, **kwargs)

    trainer.save_checkpoint = save_checkpoint
