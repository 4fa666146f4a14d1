"""FSDP2, two replicas of half the ranks each: torchrun --nproc_per_node 2 examples/first/train_fsdp2.py"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import deslo_plugin

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
fully_shard(model, mesh=mesh["shard"])  # inside a replica; between replicas there are averages alone
periods = {"params": 8, "exp_avg": 24, "exp_avg_sq": 48}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # any optimizer: its states are averaged by their names
attachment = deslo_plugin.attach(model, optimizer, {"deslo": {"sync_every": periods}}, mesh=mesh)

data = torch.Generator().manual_seed(dist.get_rank())
for _ in range(200):
    x = torch.randn(32, 16, generator=data)
    loss = (model(x).squeeze(1) - x[:, :2].sum(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

weights = deslo_plugin.averaged_state_dict(model)  # every rank: whole tensors, on the CPU
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}, {attachment.stats.bytes.total():,} bytes, {len(weights)} tensors to save")
dist.destroy_process_group()
