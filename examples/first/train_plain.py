"""Without a wrapper, every rank is a replica: torchrun --nproc_per_node 2 examples/first/train_plain.py"""

import torch
import torch.distributed as dist

import deslo_plugin

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = deslo_plugin.DesLoc(model.parameters(), lr=1e-2, sync_every={"params": 8, "exp_avg": 24, "exp_avg_sq": 48})
attachment = deslo_plugin.attach(model, optimizer)  # on every rank, before the first step

data = torch.Generator().manual_seed(dist.get_rank())  # every rank reads other data
for _ in range(200):
    x = torch.randn(32, 16, generator=data)
    loss = (model(x).squeeze(1) - x[:, :2].sum(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

weights = deslo_plugin.averaged_state_dict(model)  # every rank: the mean of all replicas
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}, {attachment.stats.bytes.total():,} bytes, {len(weights)} tensors to save")
dist.destroy_process_group()
