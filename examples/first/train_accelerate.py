"""Accelerate: torchrun --nproc_per_node 2 examples/first/train_accelerate.py, or accelerate launch"""

import torch
from accelerate import Accelerator

import deslo_plugin

config = {
    "optimizer": {"params": {"lr": 1e-2, "sync_every": {"params": 8, "exp_avg": 24, "exp_avg_sq": 48}}},
    "deslo": {"replica_size": 1},
}
accelerator = Accelerator(cpu=not torch.cuda.is_available())
deslo_plugin.attach_accelerator(accelerator, config)  # the one line; before prepare
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
x = torch.randn(6400, 16, generator=torch.Generator().manual_seed(0))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :2].sum(1)), batch_size=16, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, deslo_plugin.DesLoc(model.parameters(), config), loader)

for x, y in loader:
    loss = (model(x).squeeze(1) - y).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()

weights = deslo_plugin.averaged_state_dict(model)  # every rank
sent = accelerator.deslo.stats.bytes.total()
accelerator.print(f"loss {loss.item():.3f}, {sent:,} bytes, {len(weights)} tensors to save")
accelerator.end_training()
