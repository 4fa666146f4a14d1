"""DeepSpeed by its JSON: DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 examples/first/train_deepspeed.py"""

import deepspeed
import torch
import torch.distributed as dist

import deslo_plugin

config = {  # a ds.json as well
    "train_micro_batch_size_per_gpu": 32,
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
    "optimizer": {
        "type": "DesLoc",
        "params": {"lr": 1e-2, "sync_every": {"params": 8, "exp_avg": 24, "exp_avg_sq": 48}},
    },
    "deslo": {"replica_size": 1},  # ranks that ZeRO shards over: the GPUs of a node
}
deepspeed.init_distributed("gloo" if not torch.cuda.is_available() else "nccl")
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

data = torch.Generator().manual_seed(dist.get_rank())
for _ in range(200):
    x = torch.randn(32, 16, generator=data).to(engine.device)
    loss = (engine(x).squeeze(1) - x[:, :2].sum(1)).square().mean()
    engine.backward(loss)
    engine.step()

weights = deslo_plugin.averaged_state_dict(engine)  # every rank: the mean of all replicas, float32
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}, {engine.deslo.stats.bytes.total():,} bytes, {len(weights)} tensors to save")
dist.destroy_process_group()
