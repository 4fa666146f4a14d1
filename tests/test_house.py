"""Rules of the house that a reader relies on: imports point down, files are short, nothing imports a framework
early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deslo_plugin"
FLOORS = [
    {"version", "names", "rules", "schedule", "adaptive", "strict", "rounding", "theory", "momentum_bound", "versions"},
    {
        "periods",
        "recording",
        "config",
        "config_file",
        "shipped",
        "topology",
        "plan",
        "alternatives",
        "forecast",
        "methods",
    },
    {
        "buckets",
        "collectives",
        "progress",
        "pace",
        "last_step",
        "weights",
        "telemetry",
        "agreement",
        "log",
        "ops",
        "drift",
        "landing",
        "arguments",
        "shards",
        "probe",
        "journal",
        "fingerprint",
        "layout",
    },
    {
        "sync",
        "outer",
        "clock",
        "late",
        "last_average",
        "pseudo_gradient",
        "spread",
        "recall",
        "members",
        "stock_states",
    },
    {"averaging", "flights", "companions"},
    {"optimizer", "stock", "recorder"},
    {"simulation"},
    {"frameworks", "report"},
    {"", "run"},
    {"cli"},
]
FILES = sorted(PACKAGE.rglob("*.py"))


def floor(module: str) -> int:
    """Floor of a dotted module name of the package, "" for its __init__."""
    room = module.split(".")[0]
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_and_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 300
    own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        )
        for name in names:
            if name.split(".")[0] == "deslo_plugin":
                target = name.removeprefix("deslo_plugin").lstrip(".")
                assert floor(target) <= floor(own), f"{own} imports {target}"


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, deslo_plugin; print([m for m in ('deepspeed', 'accelerate', 'transformers') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True
    )
    assert printed.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "order",
    [
        "import deepspeed, deslo_plugin",
        "import deslo_plugin, deepspeed",
        # as accelerate looks
        "import deslo_plugin, importlib.util; importlib.util.find_spec('deepspeed'); import deepspeed",
    ],
)
def test_deepspeed_knows_desloc_in_either_order_of_imports(order):
    code = (
        f"{order}\nfrom deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as known\n"
        "print(known.count(deslo_plugin.DesLoc))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True
    )
    assert printed.stdout.split()[-1] == "1"
