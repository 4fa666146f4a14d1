"""Accelerate: one line on either side of ``accelerator.prepare``, for DDP, FSDP2 and DeepSpeed."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import DistributedType
from torch import nn

from deslo_plugin.attachment import attachment_of
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.checkpoint.export import averaged_state_dict
from deslo_plugin.checkpoint.save_load import load, save
from deslo_plugin.comm.all_or_none import all_or_none
from deslo_plugin.config.file import read_file
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.attach import attach
from deslo_plugin.frameworks.telemetry_sinks import add_scalars
from deslo_plugin.frameworks.versions import expect
from deslo_plugin.log import log_rank0
from deslo_plugin.optim.desloc import DesLoc

FOLDER = "deslo"  # in the folder of save_state
Source = Mapping[str, Any] | str | Path


def attach_accelerator(
    accelerator: Accelerator,
    config: Source | None = None,
    *,
    model: nn.Module | None = None,
    on_average: Callable[[SyncEvent], object] | None = None,
) -> None:
    """Connects what ``accelerator.prepare`` has prepared, or will prepare, to its replicas: ``attach`` for Accelerate.

    Under DeepSpeed the blocks of ``config`` join those of its JSON. ``accelerator.deslo`` is the ``Attachment`` then.
    ``save_state`` and ``load_state`` are those of ``deslo_plugin.save`` and ``load`` for the model and the optimizer.

    Args:
        accelerator: before or after ``prepare`` of one model and one optimizer.
        config: as for ``attach``; not needed for a ``DesLoc``, which has its own.
        model: after ``prepare``, the model that it returned.
        on_average: called with a ``SyncEvent`` after every average; under DeepSpeed there is
        ``accelerator.deslo.stats``.

    Raises ``ConfigError`` for what would send something over the slow link at every step, or could not be told apart.
    """
    expect("accelerate")
    if accelerator.dataloader_config.dispatch_batches:
        raise _dispatches("True")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _into_deepspeed(accelerator, config)
    if model is not None:
        _connect(accelerator, model, config, on_average)
    elif accelerator._models:
        raise ConfigError(
            "attach_accelerator(model=...)",
            "the model that prepare returned, since it was called",
            "none",
            "pass it, or call attach_accelerator before prepare",
        )
    else:
        accelerator.prepare = _preparing(accelerator, config, on_average)


def _preparing(accelerator: Accelerator, config: Source | None, on_average: Any) -> Callable[..., Any]:
    prepare = accelerator.prepare

    @functools.wraps(prepare)
    def prepare_and_attach(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        several = prepared if isinstance(prepared, tuple | list) else [prepared]
        models = [each for each in several if isinstance(each, nn.Module)]
        if models:
            accelerator.prepare = prepare
            _connect(accelerator, models[0], config, on_average)
        return prepared

    return prepare_and_attach


def _connect(accelerator: Accelerator, model: nn.Module, config: Source | None, on_average: Any) -> None:
    if any(isinstance(loader, DataLoaderDispatcher) for loader in accelerator._dataloaders):
        raise _dispatches("its default for an IterableDataset")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if attachment_of(model) is None:
            raise ConfigError(
                "attach_accelerator", 'a DeepSpeed JSON with a "deslo" block', "none", "pass config=, or add it"
            )
        accelerator.deslo = attachment_of(model)
        _agree_on_states(accelerator)
        return _track(accelerator)
    for kind, found in (("model", accelerator._models), ("optimizer", accelerator._optimizers)):
        if len(found) != 1:
            raise ConfigError(
                "attach_accelerator",
                f"one prepared {kind}",
                str(len(found)),
                "prepare model and optimizer in one call; for several, call deslo_plugin.attach for each pair",
            )
    optimizer = accelerator._optimizers[0]
    accelerator.deslo = attach(
        model, optimizer, None if isinstance(optimizer.optimizer, DesLoc) else config, on_average=on_average
    )
    _save_the_truth(accelerator, model)
    _track(accelerator)


def _track(accelerator: Accelerator) -> None:
    """The scalars of averages go to the trackers that ``accelerator.log`` knows then, by completed steps."""
    if accelerator.is_main_process:
        add_scalars(accelerator.deslo, lambda scalars, steps: accelerator.log(scalars, step=steps))


def _save_the_truth(accelerator: Accelerator, model: nn.Module) -> None:
    """``save_state`` and ``load_state`` leave model and optimizer to ``deslo_plugin.save`` and ``load``, by
    ``deslo.checkpoint_mode``."""
    save_state, load_state, world = accelerator.save_state, accelerator.load_state, accelerator.deslo.groups.world
    loaded_from: list[str] = []
    accelerator.register_load_state_pre_hook(lambda models, folder: loaded_from.append(folder))

    @functools.wraps(save_state)
    def save_everything(*args: Any, **kwargs: Any) -> Any:
        with _without_model(accelerator):
            folder = all_or_none(lambda: save_state(*args, **kwargs), world)
        save(Path(folder) / FOLDER, model)
        return folder

    @functools.wraps(load_state)
    def load_everything(*args: Any, **kwargs: Any) -> None:
        with _without_model(accelerator):
            all_or_none(lambda: load_state(*args, **kwargs), world, "see and read")
        load(Path(loaded_from.pop()) / FOLDER, model)

    accelerator.save_state, accelerator.load_state = save_everything, load_everything


def _agree_on_states(accelerator: Accelerator) -> None:
    """Under DeepSpeed: what one rank's own files fail at, all ranks hear of."""
    save_state, load_state, world = accelerator.save_state, accelerator.load_state, accelerator.deslo.groups.world
    accelerator.save_state = functools.wraps(save_state)(
        lambda *args, **kwargs: all_or_none(lambda: save_state(*args, **kwargs), world)
    )
    accelerator.load_state = functools.wraps(load_state)(
        lambda *args, **kwargs: all_or_none(lambda: load_state(*args, **kwargs), world, "see and read")
    )


@contextmanager
def _without_model(accelerator: Accelerator) -> Iterator[None]:
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers


def install() -> None:
    """``Accelerator.get_state_dict``, collective under DeepSpeed and FSDP2, gives the average there. Runs once."""
    get_state_dict = Accelerator.get_state_dict

    @functools.wraps(get_state_dict)
    def averaged(self: Accelerator, model: nn.Module, unwrap: bool = True) -> Any:
        attachment = attachment_of(model)
        collective = self.distributed_type == DistributedType.DEEPSPEED or self.is_fsdp2
        if (
            attachment is None
            or not collective
            or not (attachment.topology.replicas > 1 and attachment.averaging.diverged)
        ):
            return get_state_dict(self, model, unwrap)
        log_rank0("deslo: get_state_dict gives the average of all replicas")
        return averaged_state_dict(model, as_trained=True)

    Accelerator.get_state_dict = averaged


def _into_deepspeed(accelerator: Accelerator, config: Source | None) -> None:
    if config is None:
        return
    blocks = config if isinstance(config, Mapping) else read_file(Path(config))
    json = accelerator.state.deepspeed_plugin.deepspeed_config
    for name in ("optimizer", "deslo"):
        if name in blocks:
            if name in json and json[name] != blocks[name]:
                raise ConfigError(f'"{name}" block', "one", "two: in the DeepSpeed JSON and in config=", "keep one")
            json[name] = blocks[name]


def _dispatches(got: str) -> ConfigError:
    return ConfigError(
        "Accelerator(dataloader_config.dispatch_batches)",
        "False",
        got,
        "pass DataLoaderConfiguration(dispatch_batches=False): a batch read on one rank and sent to all crosses the "
        "slow link at every step",
    )
