import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from deslo_plugin.kernels import update as ops
from tests.support import device
from tests.support.device import DEVICE, ON_CPU
from tests.support.more import MORE
from tests.support.worlds import Processes

ROOT = Path(__file__).resolve().parent.parent
# replicas share the cores, and threads that wait for each other there cost more than they bring
torch.set_num_threads(1)
device.install()
device.hide_gpus()


ON_A_GPU_SKIP = {  # pattern in a test's name or file -> why it asks nothing of a GPU
    r"deepspeed|engine|zero.?\d": "DeepSpeed's ranks would share a device over gloo: benchmarks/gpu has it on NCCL",
    r"fsdp|hsdp": "FSDP reduces and scatters, which gloo does not do on a GPU: benchmarks/gpu has it on NCCL",
    "accelerate": "Accelerate takes a GPU for each rank: benchmarks/gpu has it on one",
    "torchft": "torchft's gloo takes tensors of the CPU",
}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what has the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in MORE):
            item.add_marker(pytest.mark.more)
    for item in () if ON_CPU else items:
        for pattern, reason in ON_A_GPU_SKIP.items():
            if re.search(pattern, item.nodeid.lower()):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def worlds():
    """The world of four ranks that tests share, if it has been started."""
    started: list[Processes] = []
    yield started
    for each in started:
        each.close()


@pytest.fixture(scope="session")
def four(worlds, tmp_path_factory):
    """Four real gloo ranks, started once; started again if a test broke them."""

    def world() -> Processes:
        if not worlds or not worlds[-1].alive:
            worlds.append(Processes(4, Path(tmp_path_factory.mktemp("world"))))
        return worlds[-1]

    return world


@pytest.fixture(autouse=True)
def room(worlds):
    """A test begins in another world than one that holds many groups; to start one takes a quarter of a second."""
    if worlds and worlds[-1].alive and worlds[-1].crowded:
        worlds[-1].close()


@pytest.fixture(scope="session")
def kernels():
    """The native module; its absence is a failure unless it was asked for."""
    if ops.native() == "python":
        if os.environ.get("DESLO_NATIVE") == "off":
            pytest.skip("deslo_plugin._C is missing because DESLO_NATIVE=off asked for none")
        pytest.fail("deslo_plugin._C is not built: run pip install -v --no-build-isolation -e . and read what it says")
    if DEVICE.type not in ops.native():
        pytest.fail(f"deslo_plugin._C has no kernels for {DEVICE.type}: build it with DESLO_NATIVE={DEVICE.type}")
    import deslo_plugin._C

    return deslo_plugin._C


@pytest.fixture(scope="session")
def emulated(kernels, tmp_path_factory):
    """The CUDA operators, compiled for the CPU, as torch.ops.deslo_emulated; on a GPU themselves."""
    if not ON_CPU:
        yield torch.ops.deslo
        return
    from torch.utils.cpp_extension import include_paths, library_paths

    built = tmp_path_factory.mktemp("emulated") / "operators.so"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-shared",
            "-w",
            "-ffp-contract=off",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f"-I{ROOT}/tests/emulation",
            *(f"-I{path}" for path in include_paths()),
            f"{ROOT}/tests/emulation/operators.cpp",
            "-o",
            built,
            *(f"-L{path}" for path in library_paths()),
            "-ltorch",
            "-ltorch_cpu",
        ],
        check=True,
    )
    library = torch.library.Library("deslo_emulated", "DEF")
    of_averages = ["drift", "land_", "fingerprint", "quantize", "mean_quantized", "dequantize", "carry_"]
    for name in [*(f"{rule}_" for rule in ops.OPERATORS), *of_averages]:
        library.define(str(getattr(torch.ops.deslo, name).default._schema).removeprefix("deslo::"))
    torch.ops.load_library(built)
    yield torch.ops.deslo_emulated
    library._destroy()


@pytest.fixture
def everywhere(kernels):
    """Goes through the instruction sets of this machine and some counts of threads; what was set before is set
    again."""
    if not ON_CPU:
        pytest.skip("instruction sets and threads: a question for the CPU alone")
    threads, widest = torch.get_num_threads(), kernels.isa()

    def settings(counts=(1, 2, 5)):
        for isa in ("baseline", "avx2", "avx512")[: {"baseline": 1, "avx2": 2, "avx512": 3}[widest]]:
            assert kernels.isa(isa) == isa
            for count in counts:
                torch.set_num_threads(count)
                yield

    yield settings
    torch.set_num_threads(threads)
    kernels.isa(widest)
