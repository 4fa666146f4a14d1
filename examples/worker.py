"""One rank of one run: an ordinary DeepSpeed training loop, and the validation of the replicas' mean."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from itertools import count
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from deepspeed.utils import logger
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import deslo_plugin
from corpus import Windows, load_bytes, split
from gpt import GPT, GPTConfig
from report import Result, Status, display

VALIDATION_FRACTION = 0.05
VALIDATION_WINDOWS = 2048  # at most: enough for the third digit of the loss, a few seconds on two cores


def train(args: Namespace) -> Result:
    """Train one model as the JSON at `args.config` says, on this rank of a launch, and validate it."""
    quieten()
    # Else DeepSpeed compiles an all-reduce for inference on CPUs: half a minute, a compiler, and, where a process is
    # killed meanwhile, a stale lock for which every later process waits in silence.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    config = load_config(args)
    shape = GPTConfig(dim=args.dim, layers=args.layers, heads=args.heads, context=args.context)
    corpus, held_out = split(load_bytes(args.data), VALIDATION_FRACTION)
    torch.manual_seed(args.seed)
    model = GPT(shape)
    parameters = sum(weight.numel() for weight in model.parameters())
    engine, _, loader, _ = deepspeed.initialize(
        model=model, config=config, training_data=Windows(corpus, shape.context, args.seed)
    )
    deslo = getattr(engine, "deslo", None)
    share = deslo.topology.replica_size if deslo else args.replica_size or 1
    gradient_bytes = parameters * engine.communication_data_type.itemsize // share

    def traffic(step: int) -> tuple[dict[str, int], tuple[int, tuple[str, ...]] | None]:
        """Bytes so far by state and what moves next; a synchronous run's are computed, as no one counts them there."""
        if deslo is None:
            return {"gradients": step * gradient_bytes}, (1, ("gradients",))
        return dict(deslo.meter.bytes), deslo.plan.next_sync(step)

    data = batches(loader)
    step_tokens = engine.train_batch_size() * shape.context
    loss_mean = None
    dist.barrier()
    start = time.perf_counter()
    with display(args.steps) if dist.get_rank() == 0 else contextlib.nullcontext() as show:
        for step in range(1, args.steps + 1):
            for _ in range(engine.gradient_accumulation_steps()):
                tokens, targets = (part.to(engine.device) for part in next(data))
                loss = engine(tokens, targets)
                engine.backward(loss)
                engine.step()
            if show:
                loss_mean = loss.item() if loss_mean is None else 0.9 * loss_mean + 0.1 * loss.item()
                speed = step * step_tokens / (time.perf_counter() - start)
                show(Status(step, loss_mean, speed, *traffic(step)))
    dist.barrier()
    seconds = time.perf_counter() - start

    moved, _ = traffic(args.steps)
    return Result(
        name=args.config.stem,
        replicas=dist.get_world_size() // share,
        replica_size=share,
        tokens=args.steps * step_tokens,
        loss=validate(deslo_plugin.averaged_state_dict(engine), shape, held_out, engine.device),
        bytes=moved,
        synchronous_bytes=args.steps * gradient_bytes,
        gradient_dtype=str(engine.communication_data_type).removeprefix("torch."),
        seconds_exposed=deslo.meter.seconds_exposed if deslo else None,
        seconds=seconds,
    )


def load_config(args: Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON with the command line's replica size, and with the scheduler's "auto" values filled in."""
    config = json.loads(args.config.read_text())
    if "deslo" in config and args.replica_size is not None:
        config["deslo"]["replica_size"] = args.replica_size
    if args.zero_stage is not None:
        config.setdefault("zero_optimization", {})["stage"] = args.zero_stage
    # Every step of every run then carries the same number of tokens.
    config.setdefault("dataloader_drop_last", True)
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
    return config


def quieten() -> None:
    """Leave the screen to the run: DeepSpeed's errors and rank 0's warnings stay, its greetings go."""
    rank = int(os.environ["RANK"])
    logger.setLevel("WARNING" if rank == 0 else "ERROR")
    # Every scheduler warns of this while it is being built.
    logger.addFilter(lambda record: "learning rate from scheduler before it has started" not in record.getMessage())
    # About torch's own functions, which DeepSpeed calls: pinned memory without a GPU, names that will go.
    warnings.filterwarnings("ignore", module=r"torch\.")


def batches(loader: DeepSpeedDataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, targets), (micro batch, context) int64 each, without end; every epoch in an order of its own."""
    if not len(loader):
        raise ValueError(
            f"--data: expected at least {loader.batch_size} windows for each rank, got {len(loader.data_sampler)}; "
            "give a longer text, a shorter --context or a smaller micro batch"
        )
    loader.num_local_io_workers = 0  # slicing a tensor is no work; the default is two more processes per rank
    for epoch in count():
        loader.data_sampler.set_epoch(epoch)  # DeepSpeed itself never does
        yield from loader


@torch.no_grad()
def validate(weights: dict[str, Tensor], shape: GPTConfig, held_out: Tensor, device: torch.device) -> float:
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
