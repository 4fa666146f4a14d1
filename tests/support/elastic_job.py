"""A script that survives the death of a rank: started again by its launcher, it goes on from its newest checkpoint.

    torchrun --nproc_per_node 3 --max-restarts 1 tests/support/elastic_job.py FOLDER [RANK STEP]

Rank RANK kills itself in step STEP, once. Prints a line ``trained from A to B: DIGEST``.
"""

import hashlib
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import deslo_plugin

STEPS, SAVE_EVERY = 14, 5
CONFIG = {
    "optimizer": {"params": {"lr": 1e-2, "sync_every": {"params": 2, "exp_avg": 4, "exp_avg_sq": 6}}},
    "deslo": {"timeout_s": 20, "checkpoint_mode": "per_replica"},
}


def main(folder: Path, victim: int | None = None, at: int | None = None) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank, died = dist.get_rank(), folder / "died"
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = deslo_plugin.DesLoc(model.parameters(), CONFIG)
    deslo_plugin.attach(model, optimizer)
    newest = deslo_plugin.latest_checkpoint(folder)
    start = deslo_plugin.load(newest, model)["step"] if newest else 0
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        if (rank, step) == (victim, at) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            deslo_plugin.save(folder / str(step + 1), model, extra={"step": step + 1})
    deslo_plugin.sync_replicas(model)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    sys.stdout.write(f"trained from {start} to {STEPS}: {digest}\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # the libraries' own threads abort now and then as they end


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
