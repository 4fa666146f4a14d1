"""The job of jobs.py through Accelerate, run on every rank of a ``Processes`` world."""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.jobs import MICRO_BATCH, batch, loss_of, net
from tests.support.theory import ACCUMULATION, CLIP
from tests.support.torch_jobs import stock_groups, two_groups, whole


def accelerator_for(kind: str, ds: dict | None = None, **options: Any) -> Any:
    """A new Accelerator in a process that may have had others."""
    from accelerate import Accelerator, PartialState
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

    logging.getLogger("deslo_plugin").setLevel(logging.ERROR)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    if kind == "deepspeed":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds), **options)
    if kind == "ddp":
        return Accelerator(cpu=True, **{"gradient_accumulation_steps": ACCUMULATION} | options)
    # Accelerate offers FSDP on accelerators only: this is its code for them, on the CPU
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="NO_WRAP", state_dict_type="SHARDED_STATE_DICT"
    )
    mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    return Accelerator(fsdp_plugin=plugin, parallelism_config=mesh, gradient_accumulation_steps=ACCUMULATION, **options)


def optimizer_for(kind: str, model: Any, blocks: dict) -> Any:
    import deslo_plugin

    if kind == "DesLoc":
        return deslo_plugin.DesLoc(two_groups(model), {key: blocks[key] for key in ("optimizer", "deslo")})
    if kind == "AdamW":
        return torch.optim.AdamW(stock_groups(model), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    from accelerate.utils import DummyOptim

    return DummyOptim(two_groups(model), lr=1e-2)


def prepared(
    kind: str, side: str, optimizer: str, blocks: dict, ds: dict | None = None, loader: Any = None, **options: Any
):
    """(accelerator, model, optimizer) with our one line before or after prepare."""
    import deslo_plugin

    accelerator = accelerator_for(kind, ds, **options)
    model = net()
    made = optimizer_for(optimizer, model, blocks)
    config = None if optimizer == "DesLoc" and kind != "deepspeed" else blocks
    if side == "before":
        deslo_plugin.attach_accelerator(accelerator, config)
    model, made, *_ = accelerator.prepare(model, made, *([loader] if loader is not None else []))
    if side == "after":
        deslo_plugin.attach_accelerator(accelerator, config, model=model)
    return accelerator, model, made


def steps(accelerator: Any, model: Any, optimizer: Any, each: range) -> None:
    for step in each:
        for micro in range(ACCUMULATION):
            with accelerator.accumulate(model):
                loss = loss_of(model, batch(dist.get_rank(), step, micro))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()


def params_of(accelerator: Any, model: Any) -> dict[str, Tensor]:
    if hasattr(model, "basic_optimizer"):
        from deslo_plugin.frameworks.deepspeed.export import full_params

        return {name: p.detach().clone().flatten() for name, p in full_params(model)}
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def run(kind: str, side: str, optimizer: str, blocks: dict, count: int, ds: dict | None = None) -> dict:
    accelerator, model, made = prepared(kind, side, optimizer, blocks, ds)
    steps(accelerator, model, made, range(count))
    return {
        "states": {"params": params_of(accelerator, model)},
        "bytes": dict(accelerator.deslo.stats.bytes),
        "replicas": accelerator.deslo.topology.replicas,
    }


def resumed(kind: str, optimizer: str, blocks: dict, folder: str) -> dict:
    """Saves after 5 steps, goes on for 4, loads, goes on for 4 again: parameters at each of these."""
    accelerator, model, made = prepared(kind, "before", optimizer, blocks)
    steps(accelerator, model, made, range(5))
    accelerator.save_state(folder)
    saved = params_of(accelerator, model)
    steps(accelerator, model, made, range(5, 9))
    once = params_of(accelerator, model)
    accelerator.load_state(folder)
    back = params_of(accelerator, model)
    steps(accelerator, model, made, range(5, 9))
    again = params_of(accelerator, model)
    return {"saved": saved, "back": back, "once": once, "again": again}


def state_dict_of(kind: str, optimizer: str, blocks: dict | None, ds: dict | None) -> tuple[Any, dict, dict]:
    """After three steps: what ``get_state_dict`` gives or raises, the mean of the replicas, and this replica's own."""
    import deslo_plugin

    accelerator, model, made = prepared(kind, "before", optimizer, blocks, ds)
    steps(accelerator, model, made, range(3))
    try:
        given = {name: tensor.clone() for name, tensor in accelerator.get_state_dict(model).items()}
    except ValueError as error:
        given = str(error)
    with deslo_plugin.local_state_dict():
        own = {name: tensor.clone() for name, tensor in accelerator.unwrap_model(model).state_dict().items()}
        own = {name: whole(tensor) for name, tensor in own.items()}
    return given, deslo_plugin.averaged_state_dict(model), own


def dispatching(how: str) -> str:
    """The error of a loader that would send every batch from rank 0."""
    from accelerate import DataLoaderConfiguration
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            return (torch.zeros(6) for _ in range(8))

    options = {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)} if how == "asked for" else {}
    blocks = {"optimizer": {"params": {}}, "deslo": {"replica_size": 2}}
    try:
        prepared("ddp", "before", "DesLoc", blocks, loader=DataLoader(Stream(), batch_size=MICRO_BATCH), **options)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
