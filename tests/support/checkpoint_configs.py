"""Configs of the job that checkpoints are made of, a checkpoint of one process, and how states are compared."""

from pathlib import Path
from typing import Any

import torch

import deslo_plugin
from tests.support.checkpoint_jobs import alone
from tests.support.engine_configs import ds_config
from tests.support.oracle import blocks
from tests.support.theory import RULES

S = RULES["mt-dao-adam-n2"]


def config_for(kind: str, **deslo) -> dict:
    if kind.startswith("zero"):
        return ds_config(S, int(kind[-1]), deslo=deslo)
    return blocks(S, **({"replica_size": 2} if kind == "ddp" else {}), **deslo)


def same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for state, tensors in a.items():
        for name, tensor in tensors.items():
            error = (tensor.double() - b[state][name].double()).abs().max()
            assert error <= tolerance, f"{state} of {name}: {error:.3g}"


def saved(path: Path, mode: str = "averaged", **options: Any) -> Path:
    torch.manual_seed(0)
    model, optimizer = alone()
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    deslo_plugin.save(path, model, mode=mode, extra={"batch": 3}, **options)
    return path
