"""Builds what a GPU machine without network needs beside Python, torch, numpy and pytest, into one folder.

    python -m benchmarks.gpu.pack [--folder build/gpu-pack] [--module FILE] [--python 3.12]

The folder gets the native module with its CUDA kernels, built by setup.py with the nvcc of this machine unless --module
names one, and wheels of DeepSpeed and of what else the parts of plan.py import. plan.py --pack takes it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_MB = 64
THERE = {"torch", "numpy", "pytest", "pip", "setuptools"}  # on every machine that is meant
BUILT = "deepspeed"  # has no wheel
WHEELS = [
    *("hjson", "pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection", "py-cpuinfo"),
    *("ninja", "msgpack", "einops", "packaging", "psutil", "tqdm"),  # DeepSpeed
    *("hypothesis", "sortedcontainers"),  # tests
    *("typer", "rich", "shellingham", "annotated-doc", "markdown-it-py", "mdurl", "pygments"),  # deslo doctor
    "PyYAML",
]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-pack")
    parser.add_argument("--module", type=Path, help="a _C.abi3.so that is built already")
    parser.add_argument("--python", default="3.12", help="of the GPU machine (%(default)s)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for old in given.folder.iterdir():
        old.unlink()
    download(given.folder, given.python)
    check(given.folder, given.python)
    add_module(given.folder, given.module)
    size = sum(path.stat().st_size for path in given.folder.iterdir()) / 1e6
    if size > LIMIT_MB:
        sys.exit(f"{given.folder}: expected at most {LIMIT_MB} MB, got {size:.0f}")
    print(f"{given.folder}: {len(list(given.folder.iterdir()))} files, {size:.1f} MB")


def pip(*arguments: str | Path, **env: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env=os.environ | env)


def download(folder: Path, python: str) -> None:
    """The wheels, in the versions of constraints.txt, or of this environment."""
    pins = read_pins(python)
    built = ["--no-deps", "--no-build-isolation", "-q", "-w", folder, f"{BUILT}=={pins[BUILT]}"]
    # nothing is compiled: with an optimizer of ours DeepSpeed uses none of its operators
    pip("wheel", *built, DS_BUILD_OPS="0", DS_ACCELERATOR="cpu")
    wanted = [f"{name}=={pins[name]}" if name in pins else name for name in WHEELS]
    with zipfile.ZipFile(next(folder.glob(f"{BUILT}-*.whl"))) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")], "DeepSpeed was built with operators"
    pydantic = pins["pydantic"]
    wanted = [core_of(pydantic) if name == "pydantic-core" else name for name in wanted]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    where = ["--python-version", python, "--implementation", "cp", *platforms, "-d", folder]
    pip("download", "-q", "--no-deps", "--only-binary=:all:", *where, *wanted)


def read_pins(python: str) -> dict[str, str]:
    """Package -> the version that constraints.txt has for this Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    there = {"python_version": python}
    return {
        each.name: next(iter(each.specifier)).version
        for each in pinned
        if each.marker is None or each.marker.evaluate(there)
    }


def core_of(pydantic: str) -> str:
    """The one pydantic-core that this pydantic takes."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder, f"pydantic=={pydantic}")
        needed = requirements(next(Path(folder).glob("*.whl")), "3.12")
    return next(str(each) for each in needed if canonicalize_name(each.name) == "pydantic-core")


def requirements(wheel: Path, python: str) -> list[Requirement]:
    """What a wheel needs on that machine, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    there = {"python_version": python, "python_full_version": f"{python}.3", "sys_platform": "linux", "extra": ""}
    there |= {"platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    there |= {"platform_python_implementation": "CPython", "implementation_name": "cpython"}
    needed = map(Requirement, found)
    return [each for each in needed if each.marker is None or each.marker.evaluate(there)]


def check(folder: Path, python: str) -> None:
    """Exits unless each wheel finds what it needs among the others, in a version that it takes."""
    versions = {}
    for wheel in folder.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        versions[canonicalize_name(name)] = version
    for wheel in sorted(folder.glob("*.whl")):
        for each in requirements(wheel, python):
            name = canonicalize_name(each.name)
            if name not in THERE and not (name in versions and each.specifier.contains(versions[name])):
                sys.exit(f"{wheel.name}: expected {each}, the pack has {versions.get(name, 'none')}")


def add_module(folder: Path, module: Path | None) -> None:
    """Copies ``module`` into the pack, or builds it beside the sources, which stay as they are."""
    if module is not None:
        shutil.copy(module, folder / "_C.abi3.so")
        return
    with tempfile.TemporaryDirectory() as scratch:
        where = ["--build-lib", scratch, "--build-temp", f"{scratch}/objects"]
        env = os.environ | {"DESLO_NATIVE": "cuda"}
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *where], check=True, cwd=ROOT, env=env)
        shutil.copy(next(Path(scratch).rglob("_C*.so")), folder / "_C.abi3.so")


if __name__ == "__main__":
    main()
