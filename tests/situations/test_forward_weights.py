"""The weights that a DeepSpeed forward uses are the masters, after whatever wrote the masters: a checkpoint that was
loaded into the running engine, ``sync_replicas``, an average, a step that was skipped. (ZeRO-3 keeps small parameters
gathered between steps.)"""

import contextlib

import pytest
import torch
from torch import nn

from tests.support import jobs
from tests.support.engine_configs import ds_config
from tests.support.jobs import (
    FP16,
    batch,
    engine_for,
    forward_uses_the_masters,
    fp16_everywhere,
    loss_of,
    net,
    replica_state,
    train,
)
from tests.support.theory import RULES

N2 = RULES["mt-dao-adam-n2"]
EXACT = {"checkpoint_mode": "per_replica"}
BF16, BIG = {"enabled": True}, {"stage": 3, "stage3_param_persistence_threshold": 0}
OFFLOADED = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
PREFETCHED = {
    "stage": 3,
    "stage3_param_persistence_threshold": 10,
    "stage3_prefetch_bucket_size": 30,
    "stage3_max_reuse_distance": 0,
}


class Leaf(nn.Sequential):
    """What DeepSpeed gathers as a whole, once it was told so."""


def model_with_a_leaf() -> nn.Module:
    from deepspeed.utils import set_z3_leaf_modules

    first, *others = net()
    model = nn.Sequential(first, Leaf(*others))
    set_z3_leaf_modules(model, [Leaf])
    return model


def evaluate(engine) -> None:
    engine.eval()
    with torch.no_grad(), forward_uses_the_masters(engine, "an evaluation"):
        loss_of(engine, batch(9, 9, 9))
    engine.train()


def a_spike(ds: dict, folder: str, leaf: bool = False) -> float:
    """Trains, saves, trains on, evaluates, rolls back in the same process and trains again: how far apart losses and
    states of both times are. Then ``sync_replicas``, with and without an evaluation before; ``train`` and ``evaluate``
    look at every forward."""
    import deslo_plugin

    with fp16_everywhere() if "fp16" in ds else contextlib.nullcontext():
        with engine_for(ds, model_with_a_leaf() if leaf else None) as engine:
            train(engine, range(5))
            deslo_plugin.save(folder, engine, mode="per_replica", extra={})
            once = train(engine, range(5, 10)), replica_state(engine)
            evaluate(engine)
            deslo_plugin.load(folder, engine)
            evaluate(engine)
            deslo_plugin.load(folder, engine)
            again = train(engine, range(5, 10)), replica_state(engine)
            deslo_plugin.sync_replicas(engine)
            evaluate(engine)
            train(engine, range(10, 11))
            evaluate(engine)
            deslo_plugin.sync_replicas(engine)
            train(engine, range(11, 13))
    apart = [abs(a - b) for a, b in zip(once[0], again[0])]
    apart += [
        float((one - again[1][state][name]).abs().max())
        for state, named in once[1].items()
        for name, one in named.items()
    ]
    return max(apart)


@pytest.mark.parametrize(
    "ds",
    [
        *(ds_config(N2, stage) for stage in range(4)),
        ds_config(N2, 2, bf16=BF16),
        ds_config(N2, 3, bf16=BF16),
        ds_config(N2, 3, fp16=FP16),
        ds_config(N2, 3, zero_optimization=BIG),
        ds_config(N2, 3, zero_optimization=OFFLOADED),
        ds_config(N2, 3, zero_optimization=PREFETCHED),
    ],
    ids=[
        "zero-0",
        "zero-1",
        "zero-2",
        "zero-3",
        "zero-2 bf16",
        "zero-3 bf16",
        "zero-3 fp16",
        "nothing persists",
        "offload",
        "prefetch",
    ],
)
def test_a_roll_back_in_the_running_engine_repeats_every_bit(four, tmp_path, ds):
    assert four().run(a_spike, ds, str(tmp_path / "saved")) == [0.0] * 4


def test_a_roll_back_of_leaf_modules_repeats_every_bit(four, tmp_path):
    assert four().run(a_spike, ds_config(N2, 3), str(tmp_path / "saved"), True) == [0.0] * 4


def stock_after_update(ds: dict, steps: int, broken: tuple[int, int] | None) -> None:
    with fp16_everywhere() if "fp16" in ds else contextlib.nullcontext(), jobs.stock_engine(ds) as engine:
        train(engine, range(steps), broken)


@pytest.mark.parametrize("more", [{}, {"fp16": FP16}, {"bf16": BF16}], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("when", ["before_step", "after_step"])
def test_an_average_of_a_stock_optimizer_is_used_by_the_next_forward(four, when, more):
    periods = {"params": 2, "exp_avg": 2, "exp_avg_sq": 2}
    for stage in [1, 3] if more else [0, 1, 2, 3]:
        ds = ds_config(
            N2, stage, deslo={"sync_every": periods, "average_at": when}, gradient_accumulation_steps=1, **more
        )
        ds["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
        four().run(stock_after_update, ds, 6, (1, 3) if more else None)


def train_alone(ds: dict, broken: tuple[int, int] | None = None) -> None:
    with engine_for(ds) as engine:
        train(engine, range(8), broken)


def test_an_average_after_the_update_is_used_in_every_sub_group(four):
    zero = {"stage": 3, "sub_group_size": 20}
    four().run(train_alone, ds_config(N2, 3, zero_optimization=zero, deslo={"average_at": "after_step"}))
    four().run(train_alone, ds_config(N2, 3, zero_optimization=zero, deslo={"average_at": "after_step"}), (1, 3))


def gathered_by_the_script(ds: dict, folder: str) -> list[float]:
    """``sync_replicas`` and ``load`` while the script holds all weights gathered: how far what it sees, and what it
    sees afterwards, is from the masters."""
    from deepspeed.runtime.zero import GatheredParameters

    import deslo_plugin
    from deslo_plugin.frameworks.deepspeed.export import full_params

    def apart(engine) -> float:
        masters = dict(full_params(engine))
        return max(
            float((p.detach() - masters[name].view(p.shape)).abs().max())
            for name, p in engine.module.named_parameters()
        )

    with engine_for(ds) as engine:
        train(engine, range(3))
        deslo_plugin.save(folder, engine, mode="per_replica")
        train(engine, range(3, 5))
        found = []
        for act in (lambda: deslo_plugin.sync_replicas(engine), lambda: deslo_plugin.load(folder, engine)):
            with GatheredParameters(list(engine.module.parameters())):
                act()
                found.append(apart(engine))
            evaluate(engine)
        train(engine, range(3, 5))
    return found


@pytest.mark.parametrize("zero", [{"stage": 3}, BIG], ids=["small ones persist", "nothing persists"])
def test_weights_that_the_script_holds_gathered_follow_meet_and_load(four, tmp_path, zero):
    ds = ds_config(N2, 3, zero_optimization=zero)
    assert four().run(gathered_by_the_script, ds, str(tmp_path / "saved")) == [[0.0, 0.0]] * 4


def written_by_the_script(ds: dict, folder: str) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    import deslo_plugin

    def write(engine) -> None:
        # DeepSpeed writes none that its ranks cannot halve
        for param in (engine.module[0].weight, engine.module[0].bias):
            safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) + 1.0)

    with engine_for(ds) as engine:
        train(engine, range(3))
        deslo_plugin.save(folder, engine, mode="per_replica")
        write(engine)
        deslo_plugin.sync_replicas(engine)
        evaluate(engine)
        write(engine)
        deslo_plugin.load(folder, engine)
        train(engine, range(3, 5))


def test_masters_that_the_script_wrote_reach_the_forward_with_meet_and_load(four, tmp_path):
    for stage in (1, 2, 3):
        four().run(written_by_the_script, ds_config(N2, stage), str(tmp_path / f"zero-{stage}"))
