"""Rules of the house that a reader relies on: imports point down, files are short, nothing imports a framework
early, and tests lie where their question does."""

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import deslo_plugin
from deslo_plugin.attachment import Attachment
from deslo_plugin.renamed import MODULES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deslo_plugin"
FLOORS = [  # a folder, or a file of the top, with those of its level; imports go to lower levels or stay in the folder
    ["errors", "log", "renamed", "version"],
    ["algorithm"],
    ["kernels"],
    ["config"],
    ["comm"],
    ["planning"],
    ["averaging"],
    ["optim"],
    ["telemetry"],
    ["checks"],
    ["attachment"],
    ["checkpoint"],
    ["simulation"],
    ["frameworks"],
    [""],
    ["run"],
    ["cli"],
]
FILES = sorted(PACKAGE.rglob("*.py"))
BESIDE = [path for folder in ("tests", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def level(module: str) -> int:
    """Of a dotted module name of the package, "" for its __init__."""
    folder = module.split(".")[0]
    return next(level for level, folders in enumerate(FLOORS) if folder in folders)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, at its top or later."""
    names, found = {name_of(path) for path in FILES}, {}
    for path in FILES:
        found[name_of(path)] = targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deslo_plugin":
                base = node.module.removeprefix("deslo_plugin").lstrip(".")
                each = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
                targets |= {name if name in names else base for name in each}
            elif isinstance(node, ast.Import):
                dotted = (alias.name for alias in node.names)
                targets |= {name[13:] for name in dotted if name.split(".")[0] == "deslo_plugin"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_import_lower_floors(path):
    lines, own = path.read_text().splitlines(), name_of(path)
    assert len(lines) <= 300 and max(map(len, lines), default=0) <= 120
    for target in imports()[own]:
        inside = target.split(".")[0] == own.split(".")[0]
        assert inside or level(target) < level(own), f"{own} imports {target}"


def test_no_circle_of_imports():
    graph, left = dict(imports()), set()
    while graph:
        free = [name for name, targets in graph.items() if targets <= left | {name}]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            left.add(name)
            del graph[name]


def test_few_files_lie_loose():
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    assert {path.name for path in (ROOT / "tests").glob("*.py")} == {"__init__.py", "conftest.py"}


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")}))
def test_a_folder_of_the_package_has_a_folder_of_tests(folder):
    assert list((ROOT / "tests" / folder).glob("test_*.py"))


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_benchmarks_and_examples_are_short_and_edit_no_path(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    # children are told where to look by PYTHONPATH, or run as modules
    assert not re.search(r"sys\.path(?:\[.*\])? *\+?= |sys\.path\.[a-z]+\(", text)


@pytest.mark.parametrize(
    ("old", "today"), [("meet", "sync_replicas"), ("one_replica", "local_state_dict"), ("latest", "latest_checkpoint")]
)
def test_an_old_name_says_the_new_one(old, today):
    with pytest.raises(AttributeError, match=f"it is called deslo_plugin.{today} now"):
        getattr(deslo_plugin, old)


@pytest.mark.parametrize(
    ("owner", "old", "today"),
    [
        (Attachment, "saw", "record_samples"),
        (Attachment, "meter", "stats"),
        (deslo_plugin.Preemption, "due", "should_stop"),
    ],
)
def test_an_old_method_says_the_new_one(owner, old, today):
    with pytest.raises(AttributeError, match=f"it is called {owner.__name__}.{today} now"):
        getattr(owner, old)


def test_an_import_of_a_module_that_has_moved_says_where_it_is():
    with pytest.raises(ModuleNotFoundError, match="deslo_plugin.optimizer is deslo_plugin.optim.desloc now"):
        importlib.import_module("deslo_plugin.optimizer")


@pytest.mark.parametrize("module", sorted(MODULES.values()))
def test_moved_modules_are_where_they_are_said_to_be(module):
    assert importlib.util.find_spec(f"deslo_plugin.{module}") is not None


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
