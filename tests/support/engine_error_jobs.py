"""Mistakes in small DeepSpeed jobs, run on every rank of a ``Processes`` world: what each rank is told."""

import os
import time
from typing import Any

import torch.distributed as dist
from torch import nn

from tests.support.engine_parallel_jobs import forget_sequences
from tests.support.jobs import HIDDEN, engine_for, net, train


def raises(ds_of_rank: list[dict] | dict, steps: int = 0, seeds: list[int] | None = None, **options: Any) -> str:
    """The message of the error that starting (and ``steps`` steps) raises on this rank, or "no error"."""
    rank = dist.get_rank()
    ds = ds_of_rank[rank] if isinstance(ds_of_rank, list) else ds_of_rank
    model = options.pop("model", None) or net(seeds[rank] if seeds else 7)
    try:
        with engine_for(ds, model, **options) as engine:
            train(engine, range(steps))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def average_refused(ds: dict, steps: int, broken: tuple[int, int]) -> tuple[str, bool]:
    """(the error of the step at which every rank stops, whether this rank's parameters are finite there)."""
    with engine_for(ds) as engine:
        try:
            for step in range(steps):
                train(engine, range(step, step + 1), broken)
        except ArithmeticError as error:
            message = f"step {step}: {type(error).__name__}: {error}"
            return message, all(bool(p.isfinite().all()) for p in engine.module.parameters())
    return "no error", True


def missed_average(ds: dict, fate: str) -> str:
    """Rank 3 sleeps or dies before the step whose average is due; what the others are told."""
    with engine_for(ds) as engine:
        try:
            for step in range(4):
                if step == 2 and dist.get_rank() == 3:
                    os._exit(1) if fate == "dead" else time.sleep(10)
                train(engine, range(step, step + 1))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def raise_with_hidden(ds: dict, outputs: list[int]) -> str:
    model = net()
    model[2] = nn.Linear(HIDDEN, outputs[dist.get_rank()])
    return raises(ds, model=model)


def given_twice(ds: dict) -> str:
    from deslo_plugin import DesLoc

    model = net()
    return raises(ds, model=model, optimizer=DesLoc(model.parameters(), lr=1e-3))


def fragments_read(every: dict[str, int]) -> tuple[int, int]:
    """Of "auto", for a stock optimizer of the JSON and for a DesLoc that the script made."""
    from deslo_plugin import DesLoc
    from deslo_plugin.frameworks.deepspeed.config import job_of

    auto = {"fragments": "auto"}
    stock, _ = job_of({"optimizer": {"type": "AdamW"}, "deslo": auto | {"sync_every": every}}, None)
    ours, _ = job_of({"deslo": auto}, DesLoc(net().parameters(), sync_every=every))
    return stock.fragments, ours.fragments


def foreign_mpu(ds: dict) -> str:
    class Unit:
        def get_data_parallel_world_size(self) -> int:
            return dist.get_world_size()

        def get_model_parallel_world_size(self) -> int:
            return 1

    return raises(ds, mpu=Unit())


def groups_that_differ(ds: dict) -> str:
    model = net()
    every = {"params": 4 if dist.get_rank() == 1 else 5}
    return raises(ds, model=model, groups=[{"params": list(model.parameters()), "sync_every": every}])


def sequences_across_replicas(ds: dict, how: str) -> str:
    """All four ranks share a sequence."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    if how == "mesh":
        return raises(ds, mesh_param=(1, 4))
    forget_sequences()
    parallel_state_sp.initialize_sequence_parallel(4)
    return raises(ds, mpu=parallel_state_sp)


def cut_wrongly(ds: dict, mistake: str) -> str:
    import deepspeed

    import deslo_plugin  # noqa: F401  (its hooks)

    first = {"patterns": ["0.weight"], "partition_type": "column"}
    if mistake == "three in one":
        first["shape"] = (2, -1)
    ds = ds | {"tensor_parallel": {"autotp_size": 2, "partition_config": {"layer_specs": [first]}}}
    ds["tensor_parallel"]["partition_config"]["use_default_specs"] = False
    model, options = net(), {"mesh_param": (2, 2)} if mistake == "with sequences" else {}
    if mistake == "built in parts":
        ds["zero_optimization"] = {"stage": 3}
        with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 2} | ds):
            model = net()
    if mistake == "Muon":
        every = ds["optimizer"]["params"]["sync_every"]
        ds["optimizer"] = {"type": "DesLoc", "params": {"rule": "muon", "lr": 1e-2, "sync_every": every}}
    try:
        return raises(ds, model=model, groups=list(model.parameters()), **options)
    finally:
        deepspeed.utils.groups._TENSOR_MODEL_PARALLEL_GROUP = None  # other tests have other degrees
