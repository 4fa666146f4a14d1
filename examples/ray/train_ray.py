"""Ray Train: python examples/ray/train_ray.py, on a cluster with `ray job submit`; each worker is one replica."""

import sys

import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model

import deslo_plugin

CONFIG = {
    "optimizer": {"params": {"lr": 1e-2, "sync_every": {"params": 8, "exp_avg": 24, "exp_avg_sq": 48}}},
    "deslo": {"replica_size": 1},
}


def train(config: dict) -> None:
    """What Ray runs on every worker, once torch.distributed is there."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    model = prepare_model(model)  # moves it to the device, and wraps it in DistributedDataParallel
    optimizer = deslo_plugin.DesLoc(model.parameters(), config)
    attachment = deslo_plugin.attach(model, optimizer)
    data = torch.Generator().manual_seed(ray.train.get_context().get_world_rank())
    loss = torch.tensor(0.0)
    for _ in range(200):
        x = torch.randn(16, 16, generator=data).to(get_device())
        loss = (model(x).squeeze(1) - x[:, :2].sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = deslo_plugin.averaged_state_dict(model)  # every worker: what a ray.train.Checkpoint is made of
    print(f"loss {loss.item():.3f}, {attachment.stats.bytes.total():,} bytes, {len(weights)} tensors")
    ray.train.report({"loss": loss.item(), "bytes": attachment.stats.bytes.total()})


if __name__ == "__main__":
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    scaling = ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available())
    TorchTrainer(train, train_loop_config=CONFIG, scaling_config=scaling, run_config=RunConfig()).fit()
