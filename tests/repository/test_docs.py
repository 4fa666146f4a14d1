"""What README and docs/ show is true: links lead somewhere, commands exist with their options, and the Python runs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support import command_line

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """Every line of a bash block or an indented block that starts a program, continuation lines joined."""
    found = []
    for page in PAGES:
        indented = re.findall(r"(?:^ {4,}\S.*\n)+", page.read_text(), flags=re.MULTILINE)
        for block in [*blocks(page, "bash"), *indented]:
            for line in block.replace("\\\n", " ").splitlines():
                try:
                    words = shlex.split(line, comments=True)
                except ValueError:  # prose
                    continue
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words and Path(words[0]).name in PROGRAMS:
                    found.append(shlex.join(words))
    return sorted(set(found))


def make(words):
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def python(words):
    if words[0] == "-m" and words[1].startswith("benchmarks."):  # some take no options, and would run
        place = words[1].replace(".", "/")
        words = [f"{place}/__main__.py" if (ROOT / place).is_dir() else f"{place}.py", *words[2:]]
    if words[0] == "-m":
        ask_module(words[1])
        return
    script = ROOT / words[0]
    assert script.is_file()
    known = "".join(path.read_text() for path in script.parent.rglob("*.py"))
    for option in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
        assert f'"{option}"' in known, option


def torchrun(words):
    from torch.distributed.run import get_args_parser

    arguments = get_args_parser().parse_args(words)
    if (ROOT / arguments.training_script).is_file():
        python([arguments.training_script, *arguments.training_script_args])


def deslo(words):
    said = help_of(*words[: 2 if words[0] == "ckpt" else 1])
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert option in said, option


@cache
def ask_module(name: str) -> None:
    subprocess.run([sys.executable, "-m", name, "--help"], check=True, capture_output=True, timeout=900, cwd=ROOT)


@cache
def help_of(*words: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        return command_line.run(*words, "--help").stdout


def installed(words):
    pass


PROGRAMS = {
    "make": make,
    "python": python,
    "torchrun": torchrun,
    "deslo": deslo,
    "deepspeed": installed,
    "accelerate": installed,
    "torchft_lighthouse": installed,
    "pip": installed,
}


@pytest.mark.parametrize("command", commands())
def test_a_command_exists_and_knows_its_options(command):
    program, *words = shlex.split(command)
    if program == "torchft_lighthouse":
        pytest.importorskip("torchft", reason="pip install 'deslo-plugin[ft]'")
    assert program == "make" or (BIN / Path(program).name).exists()
    PROGRAMS[Path(program).name](words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:configs|examples|benchmarks|docs|tests|deslo_plugin)/[\w./-]+\w)`", text):
        assert (ROOT / target).exists(), target


README_SETUP = """
import json, os, sys, logging
import torch, torch.distributed as dist
from torch import nn
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/rendezvous", rank=0, world_size=1)
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
import deepspeed, deslo_plugin
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
ds_config = json.load(open("ds.json")) | {"optimizer": None}
del ds_config["optimizer"]
model = nn.Linear(4, 2)
"""
TRAINING = """
model = nn.Linear(4, 2)
optimizer = deslo_plugin.DesLoc(model.parameters(), "deslo.yaml")
deslo_plugin.attach(model, optimizer)
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
batches = torch.randn(3, 8, 4)
def train_step(batch):
    model(batch).square().mean().backward()
    optimizer.step()
"""
ACCELERATOR = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = nn.Linear(4, 2)
optimizer = deslo_plugin.DesLoc(model.parameters(), "deslo.yaml")
"""


def test_the_python_of_the_readme_and_the_framework_pages_runs(tmp_path):
    """And of the pages that it leads to, in one process, which is one replica; each block begins with what its
    text says is there."""
    attach, evaluate = blocks(ROOT / "README.md", "python")
    initialize, given = blocks(ROOT / "docs" / "deepspeed.md", "python")
    attach_alone, accelerate = blocks(ROOT / "docs" / "pytorch.md", "python")
    save, preemption, behind = blocks(ROOT / "docs" / "checkpoints.md", "python")[:3]
    before, after = accelerate.strip().splitlines()
    script = [
        README_SETUP,
        initialize,
        given,
        "model = nn.Linear(4, 2)",
        attach_alone,
        "model, batches = nn.Linear(4, 2), torch.randn(3, 8, 4)",
        attach,
        TRAINING,
        "rank, evaluate = 0, lambda model: None",
        evaluate,
        save,
        TRAINING,
        preemption,
        behind,
        ACCELERATOR,
        before,
        "model, optimizer = accelerator.prepare(model, optimizer)",
        ACCELERATOR,
        "model, optimizer = accelerator.prepare(model, optimizer)",
        after,
        "print('all ran', sorted(weights)); sys.stdout.flush(); os._exit(0)",
    ]
    config = json.loads(blocks(ROOT / "README.md", "json")[0])
    config["deslo"]["replica_size"] = 1
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (tmp_path / "deslo.yaml").write_text("optimizer: {params: {lr: 0.001}}\ndeslo: {replica_size: 1}\n")
    (tmp_path / "script.py").write_text("\n".join(script))
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        env={"PATH": f"{BIN}:/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HOME": str(Path.home())},
    )
    assert "all ran ['bias', 'weight']" in run.stdout, run.stderr[-3000:]


def test_the_python_of_the_pages_compiles_and_that_of_robustness_runs(tmp_path):
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")
    (block,) = blocks(ROOT / "docs" / "robustness.md", "python")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "script.py").write_text(block.replace("steps=1000", "steps=60"))
    run = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0 and run.stdout.splitlines()[-1].startswith("60 "), run.stderr[-2000:]
