"""Releases of torch and frameworks: what does not work is refused with those that do; kernels for another torch are not
needed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

import deslo_plugin
from tests.support.checkpoint_jobs import alone

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, cwd=ROOT)


def test_an_older_torch_is_a_sentence_at_import():
    done = python("import torch; torch.__version__ = '2.8.0+cpu'; import deslo_plugin")
    assert done.returncode == 1
    assert "torch: expected 2.9 or later, got 2.8.0+cpu; pip install 'torch>=2.9'" in done.stderr.splitlines()[-1]


def test_kernels_for_another_torch_are_replaced_by_torchs_operators_with_one_warning():
    code = (
        "import importlib, torch\nreal = importlib.import_module\ndef load(name, package=None):\n    if name == "
        "'deslo_plugin._C': raise ImportError('undefined symbol: torch_list_size')\n    return real(name, "
        "package)\nimportlib.import_module = load\nimport importlib.util; found = "
        "importlib.util.find_spec\nimportlib.util.find_spec = lambda name, *more: name if name == 'deslo_plugin._C' "
        "else found(name, *more)\nimport deslo_plugin\nfor _ in range(2):\n    p = torch.nn.Parameter(torch.ones(2)); "
        "o = deslo_plugin.DesLoc([p], lr=0.1); p.grad = torch.ones(2); "
        "o.step()\nprint(deslo_plugin.kernels.update.native(), p[0].item() < 1)"
    )
    done = python(code)
    assert done.stdout.split() == ["python", "True"], done.stderr
    said = [line for line in done.stderr.splitlines() if "deslo_plugin._C" in line]
    assert len(said) == 1 and "undefined symbol: torch_list_size" in said[0] and "it needs torch 2.10" in said[0]
    assert "no native kernels" not in done.stderr


@pytest.mark.parametrize("name", ["accelerate", "transformers"])
def test_an_older_framework_is_a_sentence_where_it_is_connected(name):
    last = {
        "accelerate": "from deslo_plugin.frameworks.accelerate import attach_accelerator; attach_accelerator(None)",
        "transformers": "import deslo_plugin.frameworks.hf_trainer",
    }[name]
    done = python(f"import deslo_plugin, {name}; {name}.__version__ = '0.9.0'; {last}")
    assert done.returncode == 1 and f"{name}: expected" in done.stderr.splitlines()[-1], done.stderr[-1500:]


def test_a_torch_that_fills_a_copy_of_the_index_saves_and_loads(tmp_path, monkeypatch):
    """As torch 2.9 to 2.11 do: what the writer is given stays without places."""
    finish = FileSystemWriter.finish
    monkeypatch.setattr(
        FileSystemWriter, "finish", lambda self, metadata, results: finish(self, replace(metadata), results)
    )
    model, *_ = alone()
    was = model[0].weight.detach().clone()
    deslo_plugin.save(tmp_path / "saved", model)
    with torch.no_grad():
        model[0].weight.zero_()
    deslo_plugin.load(tmp_path / "saved", model)
    assert torch.equal(model[0].weight, was) and was.any()
