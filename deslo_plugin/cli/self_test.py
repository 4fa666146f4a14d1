"""Two real steps of a user's config on a tiny model and fake data: does all of it fit, and is what moves what was
planned?

Every period that is not null becomes 1, so that two steps see an average of every state; a synchronous warm-up becomes
one step before them, and a process without a launcher is one replica. All else of the config stays as it is, but for
sizes of the batch, monitors, values that are ``"auto"``, and a scheduler that has such.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deslo_plugin.algorithm.adaptive_periods import Schedule
from deslo_plugin.algorithm.schedule import Periods
from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.attachment import Attachment, attachment_of
from deslo_plugin.config.load import load_config
from deslo_plugin.config.schema import Config, OptimizerConfig
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.attach import attach
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.planning.forecast import Link, forecast

WIDTH, BATCH, STEPS = 64, 4, 2
DEEPSPEED = ("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "bf16", "fp16")
ASIDE = (  # of a DeepSpeed JSON: what belongs to a real job's data and reports
    "comment",
    "train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "flops_profiler",
    "comms_logger",
)


@dataclass(frozen=True)
class SelfTest:
    """``framework`` took the steps on ``replicas``; bytes of this rank by state, planned and counted where they were
    sent."""

    framework: str
    replicas: int
    planned: Mapping[str, int]
    counted: Mapping[str, int]
    losses: list[float]


def is_deepspeed(blocks: Mapping[str, Any]) -> bool:
    """Whether a config file is a DeepSpeed JSON, not the two blocks alone."""
    return any(key in blocks for key in DEEPSPEED)


def self_test(blocks: Mapping[str, Any], device: torch.device) -> SelfTest:
    """Takes the steps on every rank of the world, or in this process alone. Raises whatever a training script would
    get."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(device)
    if is_deepspeed(blocks) and find_spec("deepspeed") is not None:
        return _with_deepspeed(model, blocks, device)
    config = _short(load_config(without_auto(blocks)))
    optimizer = _optimizer(model, config)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    attachment = attach(model, optimizer, *([] if isinstance(optimizer, DesLoc) else [config]))

    def step(inputs: Tensor) -> Tensor:
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return _run("torch", attachment, step, device, torch.float32)


def _with_deepspeed(model: nn.Module, blocks: Mapping[str, Any], device: torch.device) -> SelfTest:
    import deepspeed

    aside = {*ASIDE, *(["scheduler"] if '"auto"' in json.dumps(blocks.get("scheduler")) else [])}
    config = without_auto({key: value for key, value in blocks.items() if key not in aside})
    config |= {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1, "steps_per_print": 10**9}
    _shorten(config)
    if not dist.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if attachment_of(engine) is None:
        raise ConfigError(
            "config",
            'a "deslo" block, or "optimizer": {"type": "DesLoc"}',
            "neither",
            "add them, or this is plain synchronous DeepSpeed",
        )
    dtype = next(engine.module.parameters()).dtype

    def step(inputs: Tensor) -> Tensor:
        loss = engine(inputs).float().square().mean()
        engine.backward(loss)
        engine.step()
        return loss

    return _run("DeepSpeed", engine.deslo, step, engine.device, dtype)


def _run(framework: str, attachment: Attachment, step: Any, device: torch.device, dtype: torch.dtype) -> SelfTest:
    steps = STEPS + attachment.config.deslo.synchronous_steps
    losses = []
    for index in range(steps):
        if attachment.config.deslo.replica_weights == "samples":
            attachment.record_samples(BATCH)
        torch.manual_seed(1000 * index + (dist.get_rank() if dist.is_initialized() else 0))
        losses.append(float(step(torch.randn(BATCH, WIDTH, device=device).to(dtype)).detach()))
    planned = forecast(attachment.plan, Link(1.0), 1.0, steps).bytes
    return SelfTest(framework, attachment.topology.replicas, planned, dict(attachment.stats.bytes), losses)


def _short(config: Config) -> Config:
    deslo = replace(
        config.deslo,
        sync_delay=1,
        fragments=1,
        synchronous_steps=min(1, config.deslo.synchronous_steps),
        timeout_s=min(60.0, config.deslo.timeout_s),
        replica_size=config.deslo.replica_size if dist.is_initialized() else 1,
    )
    if config.optimizer is None:
        return Config(optimizer=None, deslo=replace(deslo, sync_every=_every_step(config.schedule)))
    beside = config.optimizer.beside and _short_rule(config.optimizer.beside)
    return Config(optimizer=replace(_short_rule(config.optimizer), beside=beside), deslo=deslo)


def _short_rule(rule: OptimizerConfig) -> OptimizerConfig:
    periods = _every_step(rule.periods)
    return replace(rule, periods=periods, period_sources=dict.fromkeys(periods, "for the self-test"))


def _every_step(periods: Schedule) -> Periods:
    return {state: 1 if period else None for state, period in periods.items()}


def _shorten(ds: dict[str, Any]) -> None:
    """As ``_short``, in the JSON that DeepSpeed reads itself."""
    config, deslo = load_config(ds), ds.setdefault("deslo", {})
    for key in ("sync_delay", "fragments"):  # of periods that have one step now
        deslo.pop(key, None)
    deslo["timeout_s"] = min(60.0, config.deslo.timeout_s)
    if not dist.is_initialized():
        deslo["replica_size"] = 1
    if config.deslo.synchronous_steps:
        deslo["synchronous_steps"] = 1
    if config.optimizer is None:
        deslo["sync_every"] = _every_step(config.schedule)
        return
    params = ds["optimizer"].setdefault("params", {})
    _shorten_rule(params, config.optimizer)
    if config.optimizer.beside:
        _shorten_rule(params.setdefault("beside", {}), config.optimizer.beside)


def _shorten_rule(params: dict[str, Any], rule: OptimizerConfig) -> None:
    for momentum in [*params.get("momenta", []), *([params["second_moment"]] if "second_moment" in params else [])]:
        momentum.pop("sync_every", None)
    params["sync_every"] = _every_step(rule.periods)


def without_auto(value: Any) -> Any:
    """A deep copy without the values that only the Hugging Face integration fills in; ``replica_size`` may be
    "auto"."""
    if isinstance(value, Mapping):
        return {key: without_auto(each) for key, each in value.items() if each != "auto" or key == "replica_size"}
    return json.loads(json.dumps(value))


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """What the config is for: DesLoc, or the stock optimizer of torch that has the states it schedules."""
    if config.optimizer is not None:
        return DesLoc(model.parameters(), config)
    states = set(config.schedule) - {PARAMS}
    if states <= {"exp_avg", "exp_avg_sq", "step"}:
        return torch.optim.AdamW(model.parameters())
    if states <= {"momentum_buffer"}:
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    raise ConfigError(
        "deslo.sync_every",
        "states of torch's AdamW or SGD, for a self-test without your optimizer",
        ", ".join(sorted(states)),
        "trust your own first steps: attach refuses what does not fit",
    )
