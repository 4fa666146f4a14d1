"""What a GPU is asked, in order of worth: the parts of plan.py with their commands and time limits."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = "benchmarks/gpu"
CONFIG = "configs/des-loc-adam.json"
KERNEL_TESTS = [
    f"tests/{name}.py"
    for name in (
        *("kernels/test_native", "kernels/test_operators", "kernels/test_drift", "kernels/test_landing"),
        *(
            "kernels/test_fingerprint",
            "kernels/test_quantize",
            "kernels/test_records",
            "algorithm/test_rounding",
            "optim/test_optimizer",
        ),
    )
]
ELSEWHERE = "tests/repository/test_example.py trains on the CPU"
WORLD_TESTS = ["tests/frameworks/test_torch.py", "tests/frameworks/test_torch_use.py"]
DOCTOR = ["-m", "deslo_plugin.cli", "doctor", "--config", f"{HERE}/one-replica.json"]
ITSELF, COMPILES = "needs a GPU", "DeepSpeed would compile an operator of its own for the CPU first"
TINY = {  # of the dry run
    "bandwidth": ["--millions", "0.015625", "0.125", "--rounds", "3", "--tensors", "20"],
    "overlap": ["--width", "64", "--rows", "32", "--layers", "2", "--steps", "4", "--every", "2", "--link-ms", "2"],
    "host": ["--mb", "1", "--link-ms", "20", "--width", "64", "--rounds", "2"],
}


@dataclass(frozen=True)
class Part:
    """One question: a command that answers with its exit status. ``{out}`` in it is a JSON file for its figures.

    ``needs``: programs and modules without which it is skipped; ``gpu``: why the dry run cannot answer it, if so.
    """

    name: str
    command: Sequence[str]
    limit: float  # seconds
    needs: Sequence[str] = ()
    gpu: str = ""
    env: dict[str, str] = field(default_factory=dict)

    def lacks(self, device: str, site: Path) -> str:
        """Why this part cannot run here with the packages that are installed or lie in ``site``; "" if it can."""
        if self.gpu and device != "cuda":
            return self.gpu
        there = lambda name: shutil.which(name) or find_spec(name) or PathFinder.find_spec(name, [str(site)])
        missing = [name for name in self.needs if not there(name)]
        return f"{', '.join(missing)} not found" if missing else ""


def parts_for(device: str) -> list[Part]:
    """All parts; those that can run on the CPU have tiny sizes there."""
    dry = device != "cuda"
    python, where = sys.executable, ["--device", device]
    script = lambda name, *options: [python, "-m", f"benchmarks.gpu.{name}", *where, *options]
    torchrun = lambda ranks: [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=3"]
    workers = ["-n", "8"] if find_spec("xdist") and not dry else []
    figures = ["--out", "{out}"]

    def overlap(kind: str, link: str = "copies") -> Part:
        needs = ["deepspeed"] if kind.startswith("zero") else []
        options = ["--kind", kind, "--link", link, *dry * TINY["overlap"], *figures]
        return Part(f"overlap-{kind}{'-kernel' * (link == 'kernel')}", script("overlap", *options), 90, needs)

    def train(framework: str) -> Part:
        needs = {"deepspeed": ["deepspeed"], "accelerate": ["accelerate"]}.get(framework, [])
        options = ["--framework", framework, "--config", CONFIG, "--replica-size", "1"]
        command = [*torchrun(1), "examples/train.py", *options, "--steps", "200"]
        return Part(f"train-{framework}", command, 90, [*needs, "psutil", "rich"], ELSEWHERE)

    def overlap_in_few_bits(name: str) -> Part:
        whole = overlap("plain")
        options = ["--deslo", json.dumps({"wire_dtype": name})]
        return replace(whole, name=f"overlap-{name}", command=[*whole.command, *options])

    sizes = ["--dim", "64", "--layers", "1", "--laps", "2"] if dry else ["--dim", "512", "--layers", "6", "--laps", "3"]
    stands = [python, "-m", "benchmarks.checkpoint.stands", *where, *sizes]
    parts = [
        Part("smoke", script("smoke"), 90),
        Part("kernels", script("kernels", "--quick" if dry else "--big"), 300),
        Part(
            "sanitizer",
            ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *script("kernels", "--quick")],
            180,
            ["compute-sanitizer"],
            gpu=ITSELF,
        ),
        Part(
            "tests-kernels",
            [*pytest, *(["-k", "found_inf", "tests/kernels/test_native.py"] if dry else [*workers, *KERNEL_TESTS])],
            240,
            ["pytest", "hypothesis"],
        ),
        Part("bandwidth", script("bandwidth", *dry * TINY["bandwidth"], *figures), 150),
        Part("simulated", script("simulated", *dry * ["--quick"]), 60),
        Part("recipe", script("recipe", *dry * ["--quick"], "--state", "build/recipe/gpu.pt", *figures), 480),
        overlap("plain"),
        overlap_in_few_bits("int8"),
        overlap("zero2"),
        overlap("zero3"),
        overlap("ddp"),
        # its small copies from the host would wait behind a link that is made of large ones
        overlap("fsdp2", "kernel"),
        overlap("plain", "kernel"),
        Part("host", script("host", *dry * TINY["host"], *figures), 120),
        Part("late", script("late"), 60, gpu=ITSELF),
        Part("save", stands, 120, ["rich"]),
        Part("frameworks", [*torchrun(2 if dry else 4), *script("frameworks", *dry * ["--quick"])[1:]], 180),
        Part("doctor", [*torchrun(1), *DOCTOR], 90, ["typer", "rich"], COMPILES),
        *(train(framework) for framework in ("ddp", "fsdp", "accelerate", "deepspeed")),
        Part("tests-worlds", [*pytest, *WORLD_TESTS], 400, ["hypothesis"], gpu=ITSELF),
        Part(
            "ncu",
            [
                *("ncu", "--kernel-name", "regex:update", "--launch-skip", "3", "--launch-count", "1"),
                *("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "MemoryWorkloadAnalysis"),
                *script("bandwidth", "--millions", "128", "--rounds", "3"),
            ],
            120,
            ["ncu"],
            gpu=ITSELF,
        ),
    ]
    # a CPU that others use, too, is given time
    return [replace(part, limit=part.limit * (5 if dry else 1)) for part in parts]
