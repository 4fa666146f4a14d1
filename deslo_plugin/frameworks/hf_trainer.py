"""The Hugging Face Trainer under DDP and FSDP2: its own saves hold one model."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl

from deslo_plugin.attachment import attached
from deslo_plugin.checkpoint.sync_replicas import sync_replicas
from deslo_plugin.frameworks.versions import expect

expect("transformers")


class AverageBeforeSave(TrainerCallback):
    """Averages the replicas in place just before the Trainer saves, and at the end of training.

    The Trainer saves the model and the optimizer of the first rank, which are everyone's then. ``optimizer`` is a
    callback's
    keyword: what Accelerate made of the one that ``attach_accelerator`` was called for.
    """

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, *, optimizer: Any, **_: Any) -> None:
        if control.should_save:
            sync_replicas(_model_of(optimizer))

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, *, optimizer: Any, **_: Any) -> None:
        sync_replicas(_model_of(optimizer))


def _model_of(optimizer: Any) -> nn.Module:
    """The model as it was attached, wrapped; a callback's own is not."""
    return next(model for model, attachments in attached.items() if optimizer.optimizer.deslo in attachments)
