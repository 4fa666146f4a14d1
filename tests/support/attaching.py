"""What tests of attachments share: a config, an optimizer, a loop, and the messages of a rank."""

import contextlib
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.support.jobs import batch, loss_of

EVERY = {"params": 3, "exp_avg": 3, "exp_avg_sq": 3}


def config(**deslo: Any) -> dict:
    return {"deslo": {"average_at": "after_step", "sync_every": EVERY} | deslo}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@contextlib.contextmanager
def heard():
    """The package's messages on this rank."""
    logger, lines = logging.getLogger("deslo_plugin"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def train(model: nn.Module, optimizer: Any, steps: range, seat: int | None = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(dist.get_rank() if seat is None else seat, step, 0)).backward()
        optimizer.step()


class Inside(nn.Module):
    """A user's module that wraps the network itself."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


DDP = DistributedDataParallel


def error_of(act) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
