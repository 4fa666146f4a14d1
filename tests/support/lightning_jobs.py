"""The job of jobs.py in a Lightning Trainer, run on every rank of a ``Processes`` world, or alone."""

import logging
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support import torch_jobs
from tests.support.jobs import batch, engine_for, loss_of, net, replica_state, two_groups
from tests.support.theory import ACCUMULATION, CLIP

Weights = dict[str, Tensor]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def module_of(blocks: dict, optimizer: str, sharded: bool = False) -> Any:
    """A LightningModule around our net, with what ``configure_optimizers`` makes of ``blocks``."""
    from lightning.pytorch import LightningModule

    import deslo_plugin

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = net(), []

        def training_step(self, data: Any) -> Tensor:
            return loss_of(self.net, data)

        def validation_step(self, data: Any) -> None:
            self.seen.append(weights_of(self.net))

        def configure_optimizers(self) -> Any:
            if optimizer == "DesLoc":
                return deslo_plugin.DesLoc(two_groups(self.net), blocks)
            groups = torch_jobs.stock_groups(self.net)
            return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)

    class Sharded(Module):
        def configure_model(self) -> None:
            if not hasattr(self.net, "unshard"):
                torch_jobs.fsdp(self.net)

    return (Sharded if sharded else Module)()


def deepspeed_on_cpu(ds: dict) -> Any:
    """Lightning's strategy, which it offers on GPUs only: its code for them runs on the CPU too."""
    import deepspeed
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

    class OnCPU(DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)

        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()

    return OnCPU(config=ds)


def trainer_of(kind: str, callbacks: list, steps: int, ds: dict | None = None, **options: Any) -> Any:
    """A quiet Trainer of ``steps`` steps on CPUs; ``kind``: ddp, fsdp, deepspeed or single."""
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

    for name in ("lightning.pytorch", "lightning.fabric", "deslo_plugin"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    strategies = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp": lambda: ModelParallelStrategy(
            data_parallel_size=dist.get_world_size(), tensor_parallel_size=1, process_group_backend="gloo"
        ),
        "single": lambda: SingleDeviceStrategy(torch.device("cpu")),
        "deepspeed": lambda: deepspeed_on_cpu(ds or {}),
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False} | options
    quiet |= {"use_distributed_sampler": False}
    if kind != "single":
        quiet |= {"devices": dist.get_world_size(), "plugins": [TorchElasticEnvironment()]}
    return Trainer(
        accelerator="cpu",
        strategy=strategies[kind](),
        callbacks=callbacks,
        max_steps=steps,
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=CLIP,
        enable_checkpointing=any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        **quiet,
    )


def batches(steps: int, first: int = 0) -> Any:
    """This rank's own, in the order of the plain loop; a resumed Trainer goes on from what a loader gives first."""
    own = [batch(rank(), step, micro) for step in range(first, steps) for micro in range(ACCUMULATION)]
    return torch.utils.data.DataLoader(own, batch_size=None)


def weights_of(model: nn.Module) -> Weights:
    return {name: torch_jobs.whole(param) for name, param in model.named_parameters()}


def states_of(module: Any, optimizer: Any) -> dict[str, Weights]:
    names = [name for name, value in next(iter(optimizer.state.values())).items() if getattr(value, "ndim", 0)]
    return torch_jobs.states_of(module.net, optimizer, names)


def fit(kind: str, blocks: dict, optimizer: str, steps: int, **options: Any) -> dict:
    """Trains in a Trainer: the states of this replica before they are made one, and what a logger was told."""
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import CSVLogger

    from deslo_plugin.frameworks.lightning import DesLocCallback

    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found["states"] = states_of(pl_module, trainer.optimizers[0])

    ours = DesLocCallback(None if optimizer == "DesLoc" else blocks)
    module = module_of(blocks, optimizer, sharded=kind == "fsdp")
    folder = options.pop("logs", None)
    logger = CSVLogger(folder, flush_logs_every_n_steps=1) if folder else False
    trainer = trainer_of(kind, [Look(), ours], steps, logger=logger)
    trainer.fit(module, batches(steps), **options)
    if folder:
        found["rows"] = (Path(logger.log_dir) / "metrics.csv").read_text() if rank() == 0 else ""
    found["end"], found["bytes"] = weights_of(module.net), dict(ours.attachments[0].stats.bytes)
    return found


def loop(kind: str, blocks: dict, optimizer: str, steps: int) -> dict[str, Weights]:
    """The same without Lightning."""
    if kind == "single":
        import deslo_plugin

        logging.getLogger("deslo_plugin").setLevel(logging.ERROR)
        model = net()
        made = deslo_plugin.DesLoc(two_groups(model), blocks)
        deslo_plugin.attach(model, made)
        for step in range(steps):
            for micro in range(ACCUMULATION):
                (loss_of(model, batch(0, step, micro)) / ACCUMULATION).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            made.step()
            made.zero_grad()
        names = made.config.desloc.moments
    else:
        stock = None if optimizer == "DesLoc" else lambda model: module_of_stock(model)
        model, made, _ = torch_jobs.attached(kind, blocks, optimizer=stock)
        torch_jobs.train(model, made, range(steps))
        names = [name for name, value in next(iter(made.state.values())).items() if getattr(value, "ndim", 0)]
    return torch_jobs.states_of(model, made, names)


def module_of_stock(model: nn.Module) -> torch.optim.Optimizer:
    inside = getattr(model, "module", model)
    groups = torch_jobs.stock_groups(inside)
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)


def both(kind: str, blocks: dict, optimizer: str, steps: int, folder: str | None = None) -> tuple[dict, dict]:
    return fit(kind, blocks, optimizer, steps, logs=folder), loop(kind, blocks, optimizer, steps)


def resumed(kind: str, blocks: dict, folder: str, save_at: int, steps: int) -> dict:
    """What a run, whose ModelCheckpoint saves after ``save_at`` steps, has there and at its end, and one that resumes
    from that file."""
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    from deslo_plugin.frameworks.lightning import DesLocCallback

    found: dict[str, Any] = {}

    class Look(Callback):
        def __init__(self, name: str, begin: int):
            self.name, self.begin = name, begin

        def on_train_batch_start(self, trainer: Any, pl_module: Any, data: Any, index: int) -> None:
            if trainer.global_step == self.begin and f"{self.name} begins" not in found:
                found[f"{self.name} begins"] = states_of(pl_module, trainer.optimizers[0])

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found[f"{self.name} ends"] = states_of(pl_module, trainer.optimizers[0])

    for name in ("once", "again"):
        module = module_of(blocks, "DesLoc", sharded=kind == "fsdp")
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=save_at, save_top_k=-1)
        look = Look(name, save_at)
        callbacks = [look, DesLocCallback(), saver] if name == "once" else [look, DesLocCallback()]
        trainer = trainer_of(kind, callbacks, steps)
        first, path = (0, None) if name == "once" else (save_at, f"{folder}/step={save_at}.ckpt")
        trainer.fit(module, batches(steps, first), ckpt_path=path)
        found[f"{name} steps"] = trainer.optimizers[0].deslo.steps
    return found


def validated(blocks: dict, steps: int) -> tuple[list[Weights], list[Weights]]:
    """Weights that the validations before the last step saw, and this replica's own around them."""
    from lightning.pytorch.callbacks import Callback

    from deslo_plugin.frameworks.lightning import DesLocCallback

    own: list[Weights] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            own.append(weights_of(pl_module.net))

    module = module_of(blocks, "DesLoc")
    trainer = trainer_of("ddp", [Look(), DesLocCallback()], steps, val_check_interval=ACCUMULATION, limit_val_batches=1)
    trainer.fit(module, batches(steps), batches(1))
    return module.seen, own[ACCUMULATION - 1 :: ACCUMULATION]


def engines(ds: dict, folder: str, save_at: int, steps: int) -> dict:
    """The states of a replica at the end of a fit, of one that resumes from its checkpoint, and of a bare engine."""
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    from deslo_plugin.frameworks.lightning import DesLocCallback

    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found.update(last=replica_state(trainer.strategy.model))

    for name, first, path in (("once", 0, None), ("again", save_at, f"{folder}/step={save_at}.ckpt")):
        savers = [] if path else [ModelCheckpoint(folder, "{step}", every_n_train_steps=save_at, save_top_k=-1)]
        trainer = trainer_of("deepspeed", [Look(), DesLocCallback(), *savers], steps, deepcopy(ds))
        trainer.fit(module_of({}, ""), batches(steps, first), ckpt_path=path)
        found[name] = without_net(found.pop("last"))
        trainer.strategy.model.destroy()
    own = {"gradient_clipping": CLIP, "gradient_accumulation_steps": ACCUMULATION}
    model = net()
    with engine_for(deepcopy(ds) | own, model, list(model.parameters())) as engine:
        for step in range(steps):
            for micro in range(ACCUMULATION):  # Lightning divides the loss as well, and the engine once more
                engine.backward(loss_of(engine, batch(rank(), step, micro)) / ACCUMULATION)
                engine.step()
        return found | {"bare": replica_state(engine)}


def without_net(states: dict[str, Weights]) -> dict[str, Weights]:
    return {
        state: {name.removeprefix("net."): value for name, value in of_state.items()}
        for state, of_state in states.items()
    }


def refused(kind: str, blocks: dict, **options: Any) -> str:
    """What ``fit`` says, and after how many steps."""
    try:
        fit(kind, blocks, "DesLoc", 2, **options)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
