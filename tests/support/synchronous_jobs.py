"""Synchronous DeepSpeed jobs without a ``deslo`` block, whose checkpoints replicas start from."""

from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests.support.jobs import HIDDEN, INPUTS, OUTPUTS, batch, engine_for, loss_of, net, replica_state, train

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.0, "torch_adam": True}}


def adamw_of_deepspeed(stage: int, folder: str, steps: int) -> dict:
    """Saves DeepSpeed's own checkpoint, loads it, and writes it down as docs/switch.md says; the weights."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    ds = {"optimizer": ADAMW, "zero_optimization": {"stage": stage}}
    model = net()
    with engine_for(ds, model, list(model.parameters())) as engine:
        for step in range(steps):
            engine.backward(loss_of(engine, batch(dist.get_rank(), step, 0)))
            engine.step()
        engine.save_checkpoint(folder)
    model = net(seed=8)
    with engine_for(ds, model, list(model.parameters())) as engine:
        engine.load_checkpoint(folder)
        if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO 1 and 2 know states after a step
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        weights, states = {}, {}
        for name, param in engine.module.named_parameters():
            weights[name] = safe_get_full_fp32_param(param).detach().cpu()
            states[name] = {key: safe_get_full_optimizer_state(param, key).cpu() for key in ("exp_avg", "exp_avg_sq")}
            states[name]["step"] = torch.tensor(float(engine.global_steps))
        if dist.get_rank() == 0:
            groups = [{"lr": engine.get_lr()[0], "params": list(states)}]
            optimizer = {"state": states, "param_groups": groups}
            torch.save({"model": weights, "optimizer": optimizer}, f"{folder}/adamw.pt")
        return {name: weight.clone() for name, weight in weights.items()}


SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 30, "warmup_type": "linear"}}


def rate_after(steps: int) -> list[float]:
    """Of ``SCHEDULE``, for both groups; it counts from 0."""
    return [0.01 * (steps - 1) / 30] * 2


def universal_of_deepspeed(stage: int, folder: str, steps: int) -> dict:
    """A synchronous run's own checkpoint, made ``folder``/universal by DeepSpeed's converter; what was in it."""
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    model = net()
    ds = {"optimizer": ADAMW, "zero_optimization": {"stage": stage}, "scheduler": SCHEDULE}
    with engine_for(ds, model, list(model.parameters())) as engine:
        for step in range(steps):
            engine.backward(loss_of(engine, batch(dist.get_rank(), step, 0)))
            engine.step()
        engine.save_checkpoint(folder)
        if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO 1 and 2 know states after a step
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        states = {"params": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, param in engine.module.named_parameters():
            for state, found in states.items():
                get = safe_get_full_fp32_param if state == "params" else safe_get_full_optimizer_state
                whole = get(param) if state == "params" else get(param, state)
                found[name] = whole.detach().clone().cpu().flatten()
    if dist.get_rank() == 0:  # the others are waited for by whoever runs this
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        where = {"input_folder": f"{folder}/global_step{steps}", "output_folder": f"{folder}/universal"}
        ds_to_universal.main(Namespace(**options, **where, inject_missing_state=True))
    return states


def goes_on(ds: dict, folder: str, more: int) -> dict:
    """Of an engine of ours that loads the latest universal checkpoint and trains on."""
    with engine_for(ds, net(seed=8)) as engine:
        engine.load_checkpoint(folder)
        loaded = replica_state(engine)["params"]["0.weight"].tolist()
        train(engine, range(engine.global_steps, engine.global_steps + more))
        lr, steps = engine.get_lr(), engine.deslo.steps
        return {"loaded": loaded, "lr": lr, "steps": steps, "global_steps": engine.global_steps}


def read_by_deepspeed(stage: int, folder: str) -> dict:
    """What DeepSpeed's tools, and an engine without us, find in ``folder``; the engine takes a step."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = net(seed=8)
    ds = {"optimizer": ADAMW, "zero_optimization": {"stage": stage}, "checkpoint": {"load_universal": True}}
    with engine_for(ds, model, list(model.parameters())) as engine:
        engine.load_checkpoint(folder)
        if stage < 3:
            engine.optimizer.update_lp_params()
        params = dict(engine.module.named_parameters())
        weights = {name: safe_get_full_fp32_param(param).detach().clone() for name, param in params.items()}
        second = {name: safe_get_full_optimizer_state(param, "exp_avg_sq").clone() for name, param in params.items()}
        steps = engine.global_steps
        engine.backward(loss_of(engine, batch(dist.get_rank(), steps, 0)))
        engine.step()
    tools = get_fp32_state_dict_from_zero_checkpoint(folder)
    return {"tools": dict(tools), "engine": weights, "exp_avg_sq": second, "steps": steps}


def wider_refused(ds: dict, folder: str) -> str:
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN + 1), nn.Tanh(), nn.Linear(HIDDEN + 1, OUTPUTS))
    with engine_for(ds, model) as engine:
        try:
            engine.load_checkpoint(str(Path(folder).parent), tag=Path(folder).name)
        except ValueError as error:
            return str(error)
    return "no error"
