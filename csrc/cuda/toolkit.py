"""What setup.py decides about CUDA: which nvcc, for which GPUs, with which runtime library. Imports nothing but Python.

Every refusal is a ToolkitError that says what to do."""

import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # code for one runs on the later ones of its major version too
OLDEST_NVCC = (12, 1)  # the first that takes 32 kB of kernel arguments
OLDEST_GPU = 70  # the first that takes them

FLAGS = (
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--ftz=true",
    "--threads=0",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
)


class ToolkitError(Exception):
    pass


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: tuple[int, int]
    gpus: Collection[str]  # what it makes code for, as "80", "90a"
    folder: Path


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of /usr/local/cuda, in this order."""
    folders = [f"{environ[name]}/bin" for name in ("CUDA_HOME",) if environ.get(name)]
    return shutil.which("nvcc", path=":".join([*folders, environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def read_toolkit(nvcc: str) -> Toolkit:
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if not release:
        raise ToolkitError(
            f"{nvcc} --version: expected 'release X.Y', got none; put the nvcc of a CUDA toolkit on PATH"
        )
    version = int(release[1]), int(release[2])
    if version < OLDEST_NVCC:
        raise ToolkitError(
            f"{nvcc}: expected CUDA {_dotted(OLDEST_NVCC)} or newer, got {_dotted(version)}, which cannot pass "
            "32 kB of arguments to a kernel; install a newer toolkit and set CUDA_HOME to it"
        )
    # nvcc on PATH may be a script that stands elsewhere than its toolkit
    top = re.search(r"TOP=(.*)", _output(nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"))
    folder = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    return Toolkit(nvcc, version, re.findall(r"sm_(\w+)", _output(nvcc, "--list-gpu-code")), folder)


def check_runtime(toolkit: Toolkit, torch_cuda: str | None) -> None:
    """Refuses a toolkit whose runtime may want a newer driver than torch does. A torch without CUDA wants none."""
    major = int(torch_cuda.split(".")[0]) if torch_cuda else None
    if major and toolkit.version[0] > major:
        raise ToolkitError(
            f"{toolkit.nvcc}: expected CUDA {major} as torch has ({torch_cuda}), got {_dotted(toolkit.version)}: a "
            "driver that is new enough for torch may be too old for it; set CUDA_HOME to a toolkit of CUDA "
            f"{major}, or install a torch for CUDA {toolkit.version[0]}"
        )


def choose_architectures(toolkit: Toolkit, asked: str | None = None) -> list[str]:
    """What to compile for, as TORCH_CUDA_ARCH_LIST has it: ["8.0", "9.0+PTX"].

    ``asked`` is that variable, which decides if it is set; else it is all of ARCHITECTURES that nvcc knows, and PTX of
    the highest for GPUs to come.
    """
    if not asked:
        known = [name for name in ARCHITECTURES if _sm(name) in toolkit.gpus]
        if not known:
            raise ToolkitError(
                f"{toolkit.nvcc}: expected one that knows compute capability {' or '.join(ARCHITECTURES)}, got one for "
                f"{' '.join(toolkit.gpus)}; set TORCH_CUDA_ARCH_LIST or CUDA_HOME"
            )
        return [*known[:-1], f"{known[-1]}+PTX"]
    names = re.split(r"[;\s]+", asked.strip(" ;"))
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise ToolkitError(
                f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as '8.0;9.0+PTX', got {name!r}"
            )
    # images for many packages list GPUs that these kernels cannot run on
    names = [name for name in dict.fromkeys(names) if int(re.sub(r"\D", "", _sm(name))) >= OLDEST_GPU]
    unknown = [name for name in names if _sm(name) not in toolkit.gpus]
    if unknown or not names:
        raise ToolkitError(
            f"TORCH_CUDA_ARCH_LIST: expected of those that nvcc {_dotted(toolkit.version)} knows from 7.0 on, got "
            f"{asked!r}; leave the others out, or set CUDA_HOME to a toolkit that knows {', '.join(unknown) or 'one'}"
        )
    return names


def code_flags(architectures: Collection[str]) -> list[str]:
    """nvcc's arguments for what ``choose_architectures`` returns."""
    flags = []
    for name in architectures:
        sm = _sm(name)
        flags.append(f"-gencode=arch=compute_{sm},code=sm_{sm}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{sm},code=compute_{sm}")
    return flags


def runtime_folder(toolkit: Toolkit) -> Path:
    """Where libcudart_static.a is: lib64 in NVIDIA's installers, lib in pip's packages, targets/ in distributions' and
    conda's."""
    for folder in (
        *(toolkit.folder / name for name in ("lib64", "lib")),
        *sorted(toolkit.folder.glob("targets/*/lib")),
    ):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise ToolkitError(
        f"{toolkit.folder}: expected libcudart_static.a in lib64, lib or targets/*/lib, found none; install "
        "the toolkit's static runtime (cuda-cudart-dev, or cuda-cudart-static with conda)"
    )


def _sm(name: str) -> str:
    return name.removesuffix("+PTX").replace(".", "")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _output(*command: str) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ToolkitError(f"{' '.join(command)}: failed with {done.returncode}: {done.stdout.strip()[-300:]}")
    return done.stdout
