"""A script that survives the death of a rank: started again by its launcher, it goes on from its newest checkpoint.

    torchrun --nproc_per_node 3 --max-restarts 1 tests/elastic_job.py FOLDER [RANK STEP]

Rank RANK kills itself in step STEP, once. Prints a line ``trained from A to B: DIGEST``.
"""

import hashlib
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deslo_plugin

STEPS, SAVE_EVERY = 14, 5
CONFIG = {
    "optimizer": {"params": {"lr": 1e-2, "sync_every": {"params": 2, "exp_avg": 4, "exp_avg_sq": 6}}},
    "deslo": {"timeout_s": 20},
}


def save(path: Path, attachment: Any, model: torch.nn.Module, step: int) -> None:
    """One file that appears whole or not at all; replicas meet first, so that one model and one state are all there is."""
    attachment.averaging.meet()
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": attachment.optimizer.state_dict(), "step": step}, f"{path}.part")
        os.replace(f"{path}.part", path)
    dist.barrier()


def load(path: Path, attachment: Any, model: torch.nn.Module) -> int:
    """The step to go on with; 0 where nothing was saved yet."""
    if not path.exists():
        return 0
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    attachment.optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def main(folder: Path, victim: int | None = None, at: int | None = None) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, checkpoint, died = dist.get_rank(), folder / "checkpoint.pt", folder / "died"
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = deslo_plugin.DesLoc(model.parameters(), CONFIG)
    attachment = deslo_plugin.attach(model, optimizer)
    start = load(checkpoint, attachment, model)
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        if (rank, step) == (victim, at) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            save(checkpoint, attachment, model, step + 1)
    attachment.averaging.meet()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    sys.stdout.write(f"trained from {start} to {STEPS}: {digest}\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # the libraries' own threads abort now and then as they end


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
