"""What ``deslo doctor`` looks at: each check says what was found and, where it is wrong, what to do."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from deslo_plugin.cli.probe import hosts_of, lines, placement, unsteadiness
from deslo_plugin.cli.self_test import is_deepspeed, self_test
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.kernels import availability, update
from deslo_plugin.planning.link_probe import probe
from deslo_plugin.version import __version__

OK, WARNING, WRONG = "ok", "warning", "wrong"
FRAMEWORKS = ("deepspeed", "accelerate", "transformers")
NUMEL, ROUNDS = 1 << 22, 7  # of the kernels' race
# that Adam has to move: parameter, momentum and second moment read and written, the gradient read
BYTES_PER_ELEMENT = 28


@dataclass(frozen=True)
class Check:
    name: str
    status: str
    found: str
    do: str = ""


def versions() -> list[Check]:
    """Of everything on every rank; equal everywhere, and of frameworks those that are supported. Collective."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    mine = {
        "deslo_plugin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native kernels": update.native(),
        "device": device,
    }
    mine |= {name: metadata.version(name) for name in FRAMEWORKS if find_spec(name) is not None}
    everyone = all_gather_by_rank(mine) if dist.is_initialized() else {0: mine}
    checks = []
    for name in dict.fromkeys(name for each in everyone.values() for name in each):
        here = mine.get(name)
        there = {rank: each.get(name) for rank, each in everyone.items() if each.get(name) != here}
        found = "".join(f", {other or 'none'} on rank {rank}" for rank, other in list(there.items())[:1])
        different = Check(name, WRONG, (here or "none") + found, "install the same on every rank")
        checks.append(different if there or here is None else _supported(name, here))
    return checks


def kernels(device: torch.device) -> Check:
    """The update of Adam on this rank's device, in a race with torch's fused AdamW."""
    x, g, u, v = (torch.rand(NUMEL, device=device) for _ in range(4))

    def ours() -> None:
        update.adam_(
            [x],
            [g],
            [[u]],
            [v],
            t=10,
            lr=1e-4,
            weight_decay=0.0,
            betas=[0.9],
            weights=[1.0],
            beta2=0.95,
            eps=1e-8,
            bias_correction=True,
        )

    weights = torch.nn.Parameter(torch.rand(NUMEL, device=device))
    weights.grad = torch.rand(NUMEL, device=device)
    theirs = torch.optim.AdamW([weights], fused=True).step
    seconds, other = _median_seconds(ours, device), _median_seconds(theirs, device)
    rate = NUMEL * BYTES_PER_ELEMENT / seconds / 1e9
    found = (
        f"{availability.kernels_on([x])}: {rate:.3g} GB/s, {other / seconds:.2f} times as fast as torch's fused AdamW"
    )
    found += f", {dist.get_world_size()} ranks at once" if dist.is_initialized() else ""
    if complaint := availability.complaint(device):
        return Check("kernels", WARNING, f"{complaint.why}; {found}", f"every step is slower: {complaint.do}")
    return Check("kernels", OK, found)


def topology(groups: Groups) -> Check:
    """Replicas and where they lie. Collective."""
    shape, hosts = groups.topology, hosts_of(groups.topology)
    nodes = len(set(hosts))
    found = f"{shape.replicas} replica(s) of {shape.replica_size} rank(s) on {nodes} node(s), {dist.get_backend()}"
    if shape.replicas == 1:
        return Check("replicas", WARNING, found, "nothing is averaged: start more ranks, or lower deslo.replica_size")
    wrong = placement(shape, hosts)
    do = "place ranks as the job will have them" if wrong else ""
    return Check("replicas", WARNING if wrong else OK, "; ".join([found, *wrong]), do)


def link(groups: Groups, device: torch.device, host: bool) -> Check:
    """The link between replicas, measured the way that averages take. Collective."""
    measured = probe(groups, device, nbytes=8 << 20, rounds=5, host=host)
    found = "; ".join(lines(measured, groups.topology, hosts_of(groups.topology))[1:3])
    return Check("link", WARNING if measured.unsteady else OK, found, "; ".join(unsteadiness(measured)))


def steps(blocks: Mapping[str, Any], device: torch.device) -> list[Check]:
    """Two real steps of the config. Collective; raises what a training script would get."""
    checks = []
    if is_deepspeed(blocks) and find_spec("deepspeed") is None:
        checks.append(
            Check(
                "DeepSpeed",
                WARNING,
                "not installed, though the config is a DeepSpeed JSON",
                "pip install 'deslo-plugin[deepspeed]'; the two blocks were tested with torch alone",
            )
        )
    result = self_test(blocks, device)
    losses = ", ".join(f"{loss:.4g}" for loss in result.losses)
    finite = all(loss == loss and abs(loss) < float("inf") for loss in result.losses)
    checks.append(
        Check(
            "steps",
            OK if finite else WRONG,
            f"{len(result.losses)} with {result.framework}, losses {losses}",
            "" if finite else "look at lr and the dtype: the model is tiny and its inputs are normal",
        )
    )
    if result.replicas == 1:
        checks.append(
            Check("bytes", WARNING, "one replica: nothing was averaged", "start it with torchrun, on two replicas")
        )
    elif result.planned != result.counted:
        checks.append(
            Check(
                "bytes",
                WRONG,
                f"{dict(result.counted)} counted, {dict(result.planned)} planned",
                "report it with this config: the plan does not know what is sent",
            )
        )
    else:
        said = ", ".join(f"{state} {count:,}" for state, count in result.counted.items())
        checks.append(Check("bytes", OK, f"counted as planned: {said}"))
    return checks


def _supported(name: str, version: str) -> Check:
    """Whether a framework is in the range that this package was made for, by its own metadata."""
    if name not in FRAMEWORKS:
        return Check(name, OK, version)
    from packaging.requirements import Requirement  # all FRAMEWORKS depend on it

    try:
        wanted = [Requirement(each) for each in metadata.requires("deslo-plugin") or []]
    except metadata.PackageNotFoundError:
        found = f"{version}; which releases are supported is known only to an installed deslo-plugin"
        return Check(name, WARNING, found, "pip install it")
    for each in wanted:
        if each.name == name and not each.specifier.contains(version, prereleases=True):
            return Check(name, WRONG, version, f"pip install '{name}{each.specifier}': this release was made for that")
    return Check(name, OK, version)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return median(taken[2:])
