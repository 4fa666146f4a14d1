"""One rank of one run: the training loop that all frameworks share, and the validation of the replicas' mean."""

from __future__ import annotations

import contextlib
import json
import os
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset

from deslo_plugin import load_config as read_blocks
from deslo_plugin.config.switch import refuse_after_the_end

from .corpus import Windows, load_bytes, split
from .frameworks import start
from .frameworks.blocks import refuse_unread
from .frameworks.job import Batch, local_ranks
from .gpt import GPT, GPTConfig
from .report import Result, Status, display

VALIDATION_FRACTION = 0.05
VALIDATION_WINDOWS = 2048  # at most: enough for the third digit of the loss, a few seconds on two cores


def train(args: Namespace) -> Result:
    """Train one model as the JSON at `args.config` says, on this rank of a launch, and validate it."""
    config = load_config(args)
    share = replica_size(config, args)
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config.get("gradient_accumulation_steps", 1)
    shape = GPTConfig(dim=args.dim, layers=args.layers, heads=args.heads, context=args.context)
    corpus, held_out = split(load_bytes(args.data), VALIDATION_FRACTION)
    torch.manual_seed(args.seed)
    model = GPT(shape)
    parameters = sum(weight.numel() for weight in model.parameters())
    job = start(args.framework, model, config, share)
    gradient_bytes = parameters * job.gradient_dtype.itemsize // share

    def traffic(step: int) -> tuple[dict[str, int], tuple[int, tuple[str, ...]] | None]:
        """Bytes so far by state and what moves next; a synchronous run's are computed, as no one counts them there."""
        if job.deslo is None:
            return {"gradients": step * gradient_bytes}, (1, ("gradients",))
        return dict(job.deslo.stats.bytes), job.deslo.plan.next_sync(step)

    data = batches(Windows(corpus, shape.context, args.seed), micro, job.device)
    step_tokens = micro * accumulation * dist.get_world_size() * shape.context
    loss_mean = None
    dist.barrier()
    begin = time.perf_counter()
    with display(args.steps) if dist.get_rank() == 0 else contextlib.nullcontext() as show:
        for step in range(1, args.steps + 1):
            loss = job.step([next(data) for _ in range(accumulation)])
            if job.deslo:
                job.deslo.log(loss=loss, tokens=micro * accumulation * shape.context)
            if show:
                loss_mean = loss.item() if loss_mean is None else 0.9 * loss_mean + 0.1 * loss.item()
                speed = step * step_tokens / (time.perf_counter() - begin)
                show(Status(step, loss_mean, speed, *traffic(step)))
    dist.barrier()
    seconds = time.perf_counter() - begin
    if job.deslo:
        job.deslo.close()

    moved, _ = traffic(args.steps)
    return Result(
        name=args.config.stem,
        framework=args.framework,
        replicas=dist.get_world_size() // share,
        replica_size=share,
        tokens=args.steps * step_tokens,
        loss=validate(job.weights(), shape, held_out, job.device),
        bytes=moved,
        synchronous_bytes=args.steps * gradient_bytes,
        gradient_dtype=str(job.gradient_dtype).removeprefix("torch."),
        seconds_exposed=job.deslo.stats.seconds_exposed if job.deslo else None,
        seconds=seconds,
    )


def load_config(args: Namespace) -> dict[str, Any]:
    """The JSON with the command line's replica size and ZeRO stage, and with the scheduler's "auto" values filled in.

    Raises ValueError for what cannot be filled in, or has a meaning under DeepSpeed alone.
    """
    config = json.loads(args.config.read_text())
    if "train_micro_batch_size_per_gpu" not in config:
        raise ValueError(
            f"{args.config}: expected train_micro_batch_size_per_gpu, which every framework needs; write one"
        )
    if args.framework != "deepspeed":
        refuse_unread(config)
    if "deslo" in config:
        if args.framework == "torch":
            config["deslo"]["replica_size"] = 1  # nobody reduces gradients: whatever the JSON says for other frameworks
        elif args.replica_size is not None:
            config["deslo"]["replica_size"] = args.replica_size
    if args.zero_stage is not None:
        config.setdefault("zero_optimization", {})["stage"] = args.zero_stage
    automatic = {
        "total_num_steps": args.steps,
        "warmup_num_steps": max(1, args.steps // 20),
        "warmup_max_lr": config["optimizer"]["params"]["lr"],
    }
    schedule = config.get("scheduler", {}).get("params", {})
    for key in [key for key, value in schedule.items() if value == "auto"]:
        if key not in automatic:
            raise ValueError(
                f'{args.config}: scheduler.params.{key}: expected a number, got "auto"; '
                f"write one (known are {', '.join(automatic)})"
            )
        schedule[key] = automatic[key]
    if "deslo" in config:
        refuse_after_the_end(read_blocks(config), args.steps, "--steps")
    return config


def replica_size(config: Mapping[str, Any], args: Namespace) -> int:
    """Ranks per replica; "auto" is a node. Of a synchronous run, which has none, those that it is compared with.

    Raises ValueError if replicas of that size do not fill the world.
    """
    size = config["deslo"].get("replica_size", "auto") if "deslo" in config else args.replica_size or 1
    size = local_ranks() if size == "auto" else size
    world = int(os.environ["WORLD_SIZE"])
    if world % size:
        raise ValueError(f"--replica-size: expected a divisor of the {world} ranks, got {size}; use one of those")
    return size


def batches(data: Windows, micro: int, device: torch.device) -> Iterator[Batch]:
    """This rank's micro batches without end; every epoch in an order of its own, the same under every framework."""
    sampler = DistributedSampler(data)
    loader = DataLoader(data, micro, sampler=sampler, drop_last=True)
    if not len(loader):
        raise ValueError(
            f"--data: expected at least {micro} windows for each rank, got {len(sampler)}; "
            "give a longer text, a shorter --context or a smaller micro batch"
        )
    for epoch in count():
        sampler.set_epoch(epoch)
        for tokens, targets in loader:
            yield tokens.to(device), targets.to(device)


@torch.no_grad()
def validate(weights: Mapping[str, Tensor], shape: GPTConfig, held_out: Tensor, device: torch.device) -> float:
    """Mean cross-entropy in nats per byte of the fp32 model with `weights`; each rank reads its share; collective."""
    model = GPT(shape).to(device)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    windows = Windows(held_out, shape.context, seed=0)
    mine = range(dist.get_rank(), min(len(windows), VALIDATION_WINDOWS), dist.get_world_size())
    total = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, windows
    for tokens, targets in DataLoader(Subset(windows, mine), batch_size=16):
        loss = model(tokens.to(device), targets.to(device))
        total += torch.stack((loss * len(tokens), torch.full_like(loss, len(tokens))))
    dist.all_reduce(total)
    return (total[0] / total[1]).item()
