"""The type checker of ``make check`` finds what a slip of the keyboard would break."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WRONG = """
import torch
from torch import Tensor, nn
import deslo_plugin
from deslo_plugin import attach
from deslo_plugin.algorithm.rules import sgdm_
from deslo_plugin.attachment import Attachment
from deslo_plugin.comm.transport import SingleReplica, Transport
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.optim.desloc import DesLoc


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> Attachment:
    attachment = attach(model, optimizer, meshes=None)  # call-arg
    deslo_plugin.sync_replica(model)  # attr-defined
    attachment.record_samples("8")  # arg-type
    attachment.recorder.jornal  # attr-defined
    attachment.averaging.transport.progress.change("load", "", 1.0)  # union-attr
    if attachment.steps:
        said = attachment.summary()
    print(said)  # possibly-undefined
    return attachment.plan  # return-value


def step(x: list[Tensor], desloc: DesLoc) -> None:
    local("params")  # arg-type
    sgdm_(x, x, [x], t=0, lr="0.1", weight_decay=0.0, betas=(0.9,), weights=(1.0,))  # arg-type
    desloc.attach("average", x)  # arg-type


class Lossy(SingleReplica):
    def total(self, value: float, ranks: int) -> float:  # override
        return value


lossy: Transport = Lossy()  # assignment
"""


def test_the_type_checker_finds_wrong_calls(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--hide-error-context", "--no-color-output", "--no-pretty", str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    ).stdout
    lines = enumerate(WRONG.splitlines(), start=1)
    expected = {(number, line.rpartition("  # ")[2]) for number, line in lines if "  # " in line}
    # what an earlier run found is told again from the cache, by the path of then
    told = {
        (int(number), code) for number, code in re.findall(r"wrong\.py:(\d+): error: .*\[([a-z-]+)\]$", found, re.M)
    }
    assert told == expected, found
