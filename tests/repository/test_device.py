"""``DESLO_TEST_DEVICE``: what tests create lies on it, what anything else creates does not. Shown by a device that
every machine has: meta."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.device import cpu_only

ROOT = Path(__file__).resolve().parents[2]
CREATE = """
import torch
from tests.support import device
from torch import nn
device.DEVICE = torch.device("meta")
device.ON_CPU = False
device.install()
made = {
    "zeros": torch.zeros(3),
    "a list": torch.tensor([1.0]),
    "from a generator": torch.randn(3, generator=torch.Generator().manual_seed(0)),
    "told where": torch.zeros(3, device="cpu"),
    "a module": nn.Linear(2, 2).weight,
    "a module in a module": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))[1].running_mean,
    "requires grad": torch.rand(2, requires_grad=True),
}
"""


SCOPES = """
import json
found = {{}}
for name, code, file in {scopes!r}:
    exec(compile(code, file, "exec"), scope := {{}})
    found[name] = {{what: [str(tensor.device), tensor.is_leaf] for what, tensor in scope["made"].items()}}
print(json.dumps(found))
"""


@cpu_only("it looks for a device that no test runs on")
def test_tests_create_on_the_device_and_the_package_where_it_wants_to():
    scopes = [
        ("tests", CREATE, str(ROOT / "tests" / "kernels" / "test_anything.py")),
        ("package", CREATE.replace("device.install()", ""), "/elsewhere/module.py"),
    ]
    code = SCOPES.format(scopes=scopes)
    environment = {name: value for name, value in os.environ.items() if name != "DESLO_TEST_DEVICE"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    assert made["tests"].pop("told where") == ["cpu", True]
    assert all(found == ["meta", True] for found in made["tests"].values()), made["tests"]
    assert all(found == ["cpu", True] for found in made["package"].values()), made["package"]
