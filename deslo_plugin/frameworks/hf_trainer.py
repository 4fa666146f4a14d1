"""The Hugging Face Trainer under DDP and FSDP2: its own saves hold one model."""

from typing import Any

from transformers import TrainerCallback, TrainerControl

from deslo_plugin.attachment import attachment_of, model_of
from deslo_plugin.checkpoint.sync_replicas import sync_replicas
from deslo_plugin.errors import require
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
            sync_replicas(model_of(require(attachment_of(optimizer.optimizer))))

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, *, optimizer: Any, **_: Any) -> None:
        sync_replicas(model_of(require(attachment_of(optimizer.optimizer))))
