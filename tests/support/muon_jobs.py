"""The job of jobs.py by Muon in one process: threads of replicas in float64, whose update is the oracle's elsewhere."""

from typing import Any

import torch
from torch import Tensor

from tests.support import jobs
from tests.support.theory import ACCUMULATION, CLIP
from tests.support.worlds import threads

MUON = {
    "rule": "muon",
    "lr": 0.02,
    "momenta": [{"beta": 0.9, "weight": 0.3}, {"beta": 0.99, "weight": 0.4}],
    "ns_dtype": "float32",
    "sync_every": {"params": 3, "exp_avg": 2, "exp_avg_2": 5},
    "beside": {"rule": "adam", "eps": 1e-3, "sync_every": {"exp_avg": 4, "exp_avg_sq": 7}},
}


def config(framework: str, **more: Any) -> dict:
    """MUON for jobs of ``framework``: "plain", "ddp", "fsdp", "hsdp", "zero 2", ..."""
    blocks: dict[str, Any] = {"optimizer": {"type": "DesLoc", "params": MUON}, "deslo": {}}
    if framework.startswith("zero"):
        blocks |= {"gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": CLIP}
        blocks["zero_optimization"] = {"stage": int(framework[-1])}
    if framework == "ddp" or framework.startswith("zero"):
        blocks["deslo"] = {"replica_size": 2}
    return blocks | more


def in_one_process(steps: int, replicas: int) -> list[dict[str, dict[str, Tensor]]]:
    """replica -> state -> parameter name -> flat tensor."""
    from deslo_plugin import DesLoc

    shards = 4 // replicas

    def replica(average: Any) -> dict[str, dict[str, Tensor]]:
        model = models[average.rank]
        optimizer = DesLoc(jobs.two_groups(model), config("", deslo={"wire_dtype": "float64"}), transport=average)
        for step in range(steps):
            for rank in range(average.rank * shards, (average.rank + 1) * shards):
                for micro in range(ACCUMULATION):
                    inputs, targets = (each.cpu().double() for each in jobs.batch(rank, step, micro))
                    ((model(inputs) - targets).square().mean() / (shards * ACCUMULATION)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        out: dict[str, dict[str, Tensor]] = {}
        for name, param in model.named_parameters():
            tensors = {name: value for name, value in optimizer.state[param].items() if value.ndim}
            for state, value in {"params": param.detach(), **tensors}.items():
                out.setdefault(state, {})[name] = value.flatten()
        return out

    models = [jobs.net().cpu().double() for _ in range(replicas)]
    return threads(replicas, replica)
