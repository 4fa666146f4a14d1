"""CUDA kernels that were built and cannot run: a sentence before the first step, and torch's operators in their
place."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deslo_plugin
from deslo_plugin.cli import doctor_checks
from deslo_plugin.kernels import availability

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda", 0)


@pytest.fixture
def fresh(monkeypatch, caplog):
    """Nothing was found out or said yet."""
    monkeypatch.setattr(availability, "_said", set())
    caplog.set_level(logging.INFO, "deslo_plugin")
    caches = (availability.complaint, availability._settle)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.fixture
def gpu(fresh, monkeypatch):
    """A module with CUDA kernels, on a GPU that answers as ``gpu(...)`` says; what was given to torch is recorded."""
    given = []

    def make(error="", driver=13000, runtime=13000, *, backends="cpu+cuda", capability=(7, 5)):
        def cuda_status(device):
            if isinstance(error, Exception):
                raise error
            return error, driver, runtime

        module = SimpleNamespace(backends=backends, architectures="8.0 9.0+PTX", cuda_status=cuda_status)
        monkeypatch.setattr(availability, "_module", module)
        monkeypatch.setattr(availability, "_give_to_torch", given.append)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
        return given

    return make


def tensors():
    """What ``settle`` looks at, without a GPU to put it on."""
    return [SimpleNamespace(device=GPU)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            {"error": "cudaErrorInsufficientDriver", "driver": 12080},
            ["built with CUDA 13.0 and the driver is for CUDA 12.8", "CUDA_HOME", "(CUDA 12.8)", "a newer driver"],
        ),
        (
            {"error": "cudaErrorNoKernelImageForDevice"},
            [
                "code for compute capability 8.0 9.0+PTX and Tesla T4 has 7.5",
                "TORCH_CUDA_ARCH_LIST=7.5 DESLO_NATIVE=cuda",
            ],
        ),
        (
            {"error": "no current stream"},
            ["do not start on cuda:0 (no current stream)", "DESLO_NATIVE=cuda pip install"],
        ),
        ({"error": RuntimeError("a guard failed")}, ["do not start on cuda:0 (a guard failed)"]),
    ],
    ids=["driver", "architecture", "stream", "raises"],
)
def test_kernels_that_cannot_run_are_one_sentence_and_torch_runs_instead(gpu, caplog, answer, words):
    given = gpu(**answer)
    for _ in range(3):
        availability.settle(tensors())
    said = caplog.messages
    assert len(said) == 1 and "updates run on torch's operators" in said[0]
    assert all(word in said[0] for word in words), said[0]
    assert given == ["CUDA"]
    assert availability.kernels_on(tensors()) == "torch's operators on Tesla T4"


def test_a_cuda_tensor_with_cpu_kernels_alone_is_told_how_to_build_more(gpu, caplog):
    given = gpu(backends="cpu")
    availability.settle(tensors())
    (said,) = caplog.messages
    assert "no native kernels for cuda tensors (deslo_plugin._C has those for cpu alone)" in said
    assert "DESLO_NATIVE=cuda pip install" in said and given == []


def test_kernels_that_run_are_left_alone(gpu, caplog):
    given = gpu(capability=(9, 0))
    availability.settle(tensors())
    assert (caplog.messages, given) == ([], [])
    assert availability.kernels_on(tensors()) == "native on Tesla T4"


def test_the_doctor_says_what_the_sentence_says(fresh, monkeypatch):
    monkeypatch.setattr(availability, "_module", None)
    check = doctor_checks.kernels(torch.device("cpu"))
    assert check.status == doctor_checks.WARNING and "torch's operators on cpu" in check.found
    assert "DESLO_NATIVE=cpu pip install" in check.do


def test_attach_says_which_kernels_run(kernels, fresh, caplog):
    model = torch.nn.Linear(2, 2)
    deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), lr=0.1))
    assert "kernels: native on cpu" in caplog.text


def test_a_missing_module_is_said_when_the_optimizer_is_made(fresh, monkeypatch, caplog):
    monkeypatch.setattr(availability, "_module", None)
    deslo_plugin.DesLoc([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert "no native kernels for cpu tensors" in caplog.text


def test_operators_that_were_given_to_torch_run_there(kernels):
    """On the CPU, where both are. The native kernels flush subnormal numbers, and torch's operators do not."""
    code = (
        "import torch\n"
        "from deslo_plugin.kernels import availability, update\n"
        "def moved():\n"
        "    x, g, u = torch.zeros(4), torch.zeros(4), torch.full((4,), 1e-40)\n"
        "    update.sgdm_([x], [g], [[u]], t=3, lr=0.1, weight_decay=0.0, betas=[0.9], weights=[1.0])\n"
        "    return u.any().item()\n"
        "print(moved()); availability._give_to_torch('CPU'); print(moved())\n"
        "for name in ('sgdm_', 'adam_', 'adopt_', 'drift', 'land_', 'fingerprint'):\n"
        "    assert name in {operator.name for operator in availability._operators}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"], done.stderr
