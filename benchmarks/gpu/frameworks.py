"""Do replicas on a GPU train as they do on the CPU: several processes on one device, over gloo.

    torchrun --standalone --nproc_per_node 4 -m benchmarks.gpu.frameworks [--device cuda] [--case NAME]

NCCL refuses two ranks on one device, and gloo takes CUDA tensors. Each case trains on --device and on the CPU: losses
and averaged weights must be equal to 1e-3. Cases that have no peer on the CPU (GradScaler, fp16 of Accelerate) must
have stepped and averaged. Exits 1 if any case failed.
"""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

os.environ["LOCAL_RANK"] = "0"  # all ranks share the device

import torch
import torch.distributed as dist
from torch import nn

import deslo_plugin

STEPS = 12
EVERY = {"params": 2, "exp_avg": 4, "exp_avg_sq": 6}
NEAR = 1e-3
MUON = {
    "rule": "muon",
    "lr": 1e-3,
    "betas": [0.95],
    "sync_every": {"params": 2, "exp_avg": 4},
    "beside": {"rule": "adam", "betas": [0.9, 0.95], "sync_every": {"exp_avg": 4, "exp_avg_sq": 6}},
}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("DesLoc", {"replica_size": 1}),
    ("DesLoc", {"replica_size": 2}),
    ("DesLoc", {"replica_size": 2, "synchronous_steps": 3}),
    ("DesLoc", {"replica_size": 1, "sync_delay": 2}),
    ("DesLoc", {"replica_size": 2, "replica_weights": "samples"}),
    ("DesLoc", {"replica_size": 1, "average_at": "after_step"}),
    ("DesLoc", {"replica_size": 2, "on_nonfinite": "skip"}),
    ("DesLoc", {"replica_size": 1, "wire_dtype": "int8"}),
    ("DesLoc", {"replica_size": 2, "wire_dtype": "int4"}),
    ("DesLoc", {"replica_size": 2, "transport": "host"}),
    ("DesLoc", {"replica_size": 1, "transport": "host", "wire_dtype": "float8"}),
    ("DesLoc", {"replica_size": 1, "fragments": "auto"}),
    ("Muon", {"replica_size": 1}),
    ("AdamW", {"replica_size": 1}),
    ("AdamW", {"replica_size": 2, "overlap_comm": False}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", help="only cases whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="two settings of each framework")
    given = parser.parse_args()
    device = given.device
    if device == "cuda":
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("gloo")
    logging.getLogger("deslo_plugin").setLevel(logging.ERROR)
    settings = SETTINGS[:: len(SETTINGS) - 1] if given.quick else SETTINGS
    settings = [(name, deslo) for name, deslo in settings if dist.get_world_size() % deslo["replica_size"] == 0]
    cases: dict[str, Callable[[], str]] = {}
    for kind in ("ddp", "plain"):
        for name, deslo in settings:
            if kind == "ddp" or deslo["replica_size"] == 1:
                told = ", ".join(f"{key} {value}" for key, value in deslo.items())
                cases[f"{kind}, {name}, {told}"] = lambda kind=kind, name=name, deslo=deslo: compare(
                    kind, name, deslo, device
                )
    for name in ("DesLoc", "AdamW"):
        cases[f"GradScaler, {name}"] = lambda name=name: scaled(name, device)
        cases[f"accelerate fp16, {name}"] = lambda name=name: accelerated(name, device)
    failed = []
    for name, case in cases.items():
        if given.case and given.case not in name:
            continue
        try:
            wrong = case()
        except Exception:
            wrong = traceback.format_exc(limit=-3)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, wrong)
        if dist.get_rank() == 0:
            bad = next((each for each in everyone if each and not each.startswith("skipped")), "")
            print(f"{'FAILED' if bad else 'ok    '} {name}" + (f": {bad or wrong}" if bad or wrong else ""), flush=True)
        failed += [name] * any(each and not each.startswith("skipped") for each in everyone)
    dist.barrier()
    sys.stdout.flush()
    os._exit(bool(failed))  # gloo's threads may abort a process that takes itself apart in order


def net(device: str) -> nn.Module:
    torch.manual_seed(0)  # the same numbers on every device
    return nn.Sequential(nn.Linear(33, 65, bias=False), nn.BatchNorm1d(65), nn.Tanh(), nn.Linear(65, 7)).to(device)


def batch(step: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(8, 33, generator=generator).to(device)


def attached(kind: str, name: str, deslo: dict[str, Any], device: str) -> tuple[nn.Module, Any, Any]:
    """(model, optimizer, attachment)."""
    model = net(device)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if name != "AdamW":
        params = MUON if name == "Muon" else {"lr": 1e-2, "sync_every": EVERY}
        config = {"optimizer": {"params": params}, "deslo": deslo}
        optimizer = deslo_plugin.DesLoc(model.parameters(), config)
        return model, optimizer, deslo_plugin.attach(model, optimizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, deslo_plugin.attach(model, optimizer, {"deslo": {"sync_every": EVERY} | deslo})


def trained(kind: str, name: str, deslo: dict[str, Any], device: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of this rank, and the averaged weights; saves and loads on the way."""
    model, optimizer, attachment = attached(kind, name, deslo, device)
    losses = []
    for step in range(STEPS):
        if "replica_weights" in deslo:
            attachment.record_samples(8)
        loss = model(batch(step, device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    mean = deslo_plugin.averaged_state_dict(model)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    deslo_plugin.save(folder[0], model)
    deslo_plugin.load(folder[0], model)
    assert attachment.stats.events["params"] > 0, "expected averages of the parameters, got none"
    return losses, {key: value.cpu() for key, value in mean.items() if value.is_floating_point()}


def compare(kind: str, name: str, deslo: dict[str, Any], device: str) -> str:
    ours, mean = trained(kind, name, deslo, device)
    theirs, expected = trained(kind, name, deslo, "cpu")
    losses = max(abs(a - b) for a, b in zip(ours, theirs))
    weights = max((mean[key] - expected[key]).abs().max().item() for key in expected)
    if losses < NEAR and weights < NEAR:
        return ""
    return f"losses are {losses:.2g} and weights {weights:.2g} from those of the CPU"


def stepped(attachment: Any, optimizer: Any) -> str:
    """What is wrong after ``STEPS`` steps that none of the scaler's checks left out."""
    if attachment.steps != STEPS:
        return f"expected {STEPS} steps, the attachment counted {attachment.steps}"
    return "" if attachment.stats.events["params"] >= STEPS // EVERY["params"] - 1 else "parameters were not averaged"


def scaled(name: str, device: str) -> str:
    model, optimizer, attachment = attached("ddp", name, {"replica_size": 1}, device)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    for step in range(STEPS):
        with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
            loss = model(batch(step, device)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return stepped(attachment, optimizer)


def accelerated(name: str, device: str) -> str:
    """Accelerate installs the optimizer's ``step`` anew at every step of a scaler."""
    if device != "cuda":
        return "skipped, Accelerate has fp16 on GPUs alone"
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        return "skipped, accelerate is not installed"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(mixed_precision="fp16")
    model = net("cpu")
    deslo: dict[str, Any] = {"replica_size": 1}
    if name == "DesLoc":
        config = {"optimizer": {"params": {"lr": 1e-2, "sync_every": EVERY}}, "deslo": deslo}
        optimizer = deslo_plugin.DesLoc(model.parameters(), config)
    else:
        config = {"deslo": deslo | {"sync_every": EVERY}}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    deslo_plugin.attach_accelerator(accelerator, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = accelerator.deslo.steps
    taken = 0
    for step in range(STEPS):
        with contextlib.nullcontext():
            loss = model(batch(step, device)).float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        taken += not optimizer.step_was_skipped
        optimizer.zero_grad()
    counted = accelerator.deslo.steps - before
    if counted < taken:
        return f"expected {taken} steps or more, the attachment counted {counted}"
    return "" if accelerator.deslo.stats.events["params"] else "parameters were not averaged"


if __name__ == "__main__":
    main()
