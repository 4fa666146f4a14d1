"""What a script does around the training of an engine, run on every rank of a ``Processes`` world."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.jobs import (
    HIDDEN,
    INPUTS,
    MICRO_BATCH,
    OUTPUTS,
    batch,
    engine_for,
    loss_of,
    net,
    replica_state,
    train,
    two_groups,
)


def given_optimizer(how: str, ds: dict, block: dict, steps: int) -> dict:
    """The job with its optimizer made by the script, as an object or by a callable."""
    from deslo_plugin import DesLoc

    params = block["optimizer"]["params"]
    model = net()
    groups = two_groups(model)
    make = lambda given: DesLoc(given, **params)
    optimizer = make(groups) if how == "object" else make
    options = {"groups": None if how == "object" else groups, "optimizer": optimizer}
    with engine_for({**ds, "deslo": block["deslo"]}, model, **options) as engine:
        train(engine, range(steps))
        return {"states": replica_state(engine)}


def resumed(ds: dict, folder: str, before: int, after: int) -> tuple[dict, dict]:
    """(states after before + after steps in one go, states after a save, a new engine and a load in between)."""
    with engine_for(ds) as engine:
        train(engine, range(before))
        engine.save_checkpoint(folder)
        train(engine, range(before, before + after))
        straight = replica_state(engine)
    with engine_for(ds, net(seed=8)) as engine:
        engine.load_checkpoint(folder)
        train(engine, range(before, before + after))
        return {"states": straight}, {"states": replica_state(engine)}


def load_only(ds: dict, folder: str) -> str:
    with engine_for(ds) as engine:
        try:
            return str(engine.load_checkpoint(folder))
        except ValueError as error:
            return str(error)


def sixteen_bit_export(ds: dict, folder: str) -> tuple[dict[str, Tensor], str]:
    """Exports after three steps; the mean of the replicas, and the error of ``module.state_dict()``."""
    import deslo_plugin

    with engine_for(ds) as engine:
        train(engine, range(3))
        engine.save_16bit_model(folder)
        try:
            engine.module.state_dict()
        except ValueError as error:
            return deslo_plugin.averaged_state_dict(engine), str(error)
    return {}, "no error"


def sharded_from_birth(ds: dict, steps: int, with_config: bool = True) -> dict | str:
    """The job with its model built under ``zero.Init``."""
    import deepspeed

    import deslo_plugin  # noqa: F401  (its hooks)

    base = {"train_micro_batch_size_per_gpu": MICRO_BATCH} | ds
    torch.manual_seed(7)
    with deepspeed.zero.Init(**({"config_dict_or_path": base} if with_config else {})):
        model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))
    groups = [
        {"params": [p for p in model.parameters() if len(p.ds_shape) == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if len(p.ds_shape) == 1], "lr": 5e-3, "sync_every": {"params": 2}},
    ]
    try:
        with engine_for(ds, model, groups) as engine:
            train(engine, range(steps))
            return {"states": replica_state(engine)}
    except ValueError as error:
        return str(error)


def beside_a_plain_engine(ds: dict, steps: int) -> tuple[dict, list[int]]:
    """The job with a second, plain engine built after ours; (our states, the ranks of the plain engine's group)."""
    from deepspeed.utils import groups as deepspeed_groups

    plain = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    with engine_for(ds) as ours:
        model = net(9)
        with engine_for(plain, model, list(model.parameters())) as theirs:
            ranks = dist.get_process_group_ranks(theirs.data_parallel_group)
            train(ours, range(steps))
            rank = dist.get_rank()
            theirs.backward(loss_of(theirs, batch(rank, 0, 0)))
            theirs.step()
            assert deepspeed_groups.mpu is None
        return {"states": replica_state(ours)}, ranks


def data_seen(ds: dict) -> list[int]:
    """The samples that ``training_data=`` gives this rank in one epoch."""
    data = torch.utils.data.TensorDataset(torch.arange(32))
    with engine_for(ds, training_data=data) as engine:
        return [int(sample) for (samples,) in engine.training_dataloader for sample in samples]


def averaged_model(ds: dict, steps: int) -> tuple[dict, dict]:
    import deslo_plugin

    with engine_for(ds) as engine:
        train(engine, range(steps))
        before = replica_state(engine)["params"]
        exported = deslo_plugin.averaged_state_dict(engine)
        after = replica_state(engine)["params"]
        assert all(torch.equal(before[name], after[name]) for name in before)
        return before, exported


def padding_of_zero_3(ds: dict) -> list[float]:
    """What lies in this rank's partitions beyond the model's own elements, after memory was made dirty."""
    dirt = [torch.full((n,), float("nan")) for n in range(1, 64) for _ in range(8)]
    del dirt
    with engine_for(ds) as engine:
        flat = torch.cat(engine.optimizer.fp32_partitioned_groups_flat)
        train(engine, range(4))
        counted = sum(p.ds_numel for p in engine.module.parameters())
        return [flat.numel(), counted, int(flat.isnan().sum())]
