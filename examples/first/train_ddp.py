"""DDP with every rank a replica of its own: torchrun --nproc_per_node 2 examples/first/train_ddp.py"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import deslo_plugin

dist.init_process_group("gloo")
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
model = DistributedDataParallel(model)
config = {
    "optimizer": {"params": {"lr": 1e-2, "sync_every": {"params": 8, "exp_avg": 24, "exp_avg_sq": 48}}},
    "deslo": {"replica_size": 1},  # 8: the GPUs of a node are one replica, and reduce gradients at every step
}
optimizer = deslo_plugin.DesLoc(model.parameters(), config)
attachment = deslo_plugin.attach(model, optimizer)  # after DDP(model): gradients stay inside a replica from now on

data = torch.Generator().manual_seed(dist.get_rank())
for _ in range(200):
    x = torch.randn(32, 16, generator=data)
    loss = (model(x).squeeze(1) - x[:, :2].sum(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

with deslo_plugin.averaged_weights(model):  # every rank: evaluate one model, not this replica
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(99))
    loss = (model(x).squeeze(1) - x[:, :2].sum(1)).square().mean()
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}, {attachment.stats.bytes.total():,} bytes")
dist.destroy_process_group()
