"""Synchronous DeepSpeed jobs without a ``deslo`` block, whose checkpoints replicas start from."""

import torch
import torch.distributed as dist

from tests.support.jobs import batch, engine_for, loss_of, net

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
