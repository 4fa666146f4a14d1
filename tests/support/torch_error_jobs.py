"""Mistakes in jobs of DDP, FSDP2 and plain torch, on every rank of a ``Processes`` world: what each rank is told."""

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.support.jobs import batch, loss_of, net
from tests.support.torch_jobs import attached, raises, train


def unequal(initial: str) -> str:
    """Every rank seeds its model differently."""
    config = {"deslo": {"initial_params": initial, "replica_size": 1}}
    try:
        model, *_ = attached("plain", config, net(seed=dist.get_rank()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [p.tolist() for p in model.parameters()])
    return "equal" if all(each == everyone[0] for each in everyone) else "unequal"


def moved_internals(blocks: dict) -> str:
    """attach of an HSDP model where torch's attribute is gone."""
    import deslo_plugin.frameworks.fsdp2 as own

    def gone(*_: Any) -> None:
        raise AttributeError("'FSDPParamGroup' object has no attribute 'mesh_info'")

    original, own._point_at_shards = own._point_at_shards, gone
    try:
        return raises("hsdp", blocks)
    finally:
        own._point_at_shards = original


def misused(mistake: str, blocks: dict) -> str:
    import deslo_plugin

    rank, model = dist.get_rank(), net()
    if mistake == "different model" and rank == 3:
        model[2] = nn.Linear(8, 4)
    lr = 2e-2 if mistake == "different lr" and rank == 3 else 1e-2
    if mistake == "different config" and rank == 3:
        blocks = blocks | {"deslo": {"average_at": "after_step"}}
    stock = mistake in ("no schedule", "DesLoc config")
    optimizer = (
        torch.optim.AdamW(model.parameters())
        if stock
        else deslo_plugin.DesLoc([{"params": list(model.parameters()), "lr": lr}], blocks)
    )
    try:
        if mistake == "not attached":
            optimizer.step()
        given = mistake in ("config twice", "DesLoc config") or mistake == "config of one rank" and rank == 3
        config = blocks if given else None
        for _ in range(2):
            deslo_plugin.attach(model, optimizer, config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fewer_steps(blocks: dict) -> str:
    model, optimizer, _ = attached("plain", blocks)
    for step in range(5):
        if dist.get_rank() == 3 and step == 2:
            time.sleep(8)  # its process lives on, as one that saves or evaluates would
            return "left"
        train(model, optimizer, range(step, step + 1))
    return "no error"


def poisoned(blocks: dict, culprit: int) -> tuple[str, bool]:
    """(the error that stops this rank, whether its parameters are finite)."""
    model, optimizer, _ = attached("plain", blocks)
    for step in range(5):
        loss = loss_of(model, batch(dist.get_rank(), step, 0))
        (loss * float("nan") if dist.get_rank() == culprit and step == 1 else loss).backward()
        try:
            optimizer.step()
        except ArithmeticError as error:
            return f"{type(error).__name__}: {error}", all(bool(p.isfinite().all()) for p in model.parameters())
        optimizer.zero_grad()
    raise AssertionError("no error")


def missing(blocks: dict, fate: str, culprit: int, step: int) -> str:
    """What stops this rank when ``culprit`` does not come to ``step``, or dies there; other attachments are about
    too."""
    others = [attached("plain", blocks) for _ in range(2)]
    model, optimizer, _ = attached("plain", blocks)
    train(*others[0][:2], range(2))
    for now in range(20):
        if dist.get_rank() == culprit and now == step:
            if fate == "dead":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(8)  # its process lives on, as one that saves or evaluates would
            return "left"
        try:
            train(model, optimizer, range(now, now + 1))
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "no error"
