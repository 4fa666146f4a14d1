"""A Llama with adapters of peft, trained on every rank of a ``Processes`` world."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import deslo_plugin
from tests.support.parallel_models import WIDTH
from tests.support.tiny_llama import llama
from tests.support.torch_jobs import mesh_of

PERIODS = {"params": 2, "exp_avg": 3, "exp_avg_sq": 6}
CONFIG = {"optimizer": {"params": {"lr": 0.1, "sync_every": PERIODS}}, "deslo": {"replica_size": 2}}


def adapted() -> Any:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for param in model.parameters():  # as after some training: peft begins with one of two matrices at zero
            if param.requires_grad:
                param.add_(0.1)
    return model


def wrapped(kind: str, model: Any) -> tuple[nn.Module, dict[str, Any]]:
    if kind == "ddp":
        return DistributedDataParallel(model), {}
    mesh = mesh_of((2, 2), ("replicate", "shard"))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    return fully_shard(model, mesh=mesh["shard"]), {"mesh": mesh}


def whole(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param.clone()).detach()


def trained(kind: str, folder: str) -> dict[str, Any]:
    """What is left of the base, the mean of the adapters over all ranks, and what was saved and sent."""
    model = adapted()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    outer, where = wrapped(kind, model)
    optimizer = deslo_plugin.DesLoc(outer.parameters(), CONFIG)
    attachment = deslo_plugin.attach(outer, optimizer, **where)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(7):
        outer(torch.randn(3, 5, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = deslo_plugin.averaged_state_dict(outer)
    own = {name: whole(param) for name, param in model.named_parameters()}
    means = {name: value.clone() for name, value in own.items() if "lora" in name}
    for value in means.values():
        dist.all_reduce(value, op=dist.ReduceOp.AVG)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
    deslo_plugin.save(Path(folder) / "ours", outer)
    return {
        "base kept": all(torch.equal(own[name], value) for name, value in before.items() if "lora" not in name),
        "moved": min((own[name] - before[name]).abs().max().item() for name in means),
        "apart": max((own[name] - value).abs().max().item() for name, value in means.items()),
        "means": means,
        "averaged": {name: weights[name] for name in means},
        "elements": sum(value.numel() for value in means.values()),
        "bytes": dict(attachment.stats.bytes),
    }
