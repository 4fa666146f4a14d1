"""Outside a checkout: the built wheel in an environment with what its metadata declares, for each extra, and nothing
else."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as pip builds it, without kernels."""
    tree, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("deslo_plugin", "configs", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        check=True,
        capture_output=True,
        timeout=600,
        env=os.environ | {"DESLO_NATIVE": "off"},
    )
    return next(out.glob("*.whl"))


def declared(requirements: list[str], extras: set[str], found: dict) -> dict:
    """Name -> distribution of everything that ``requirements`` bring, as pip would install it."""
    for each in map(Requirement, requirements):
        if each.marker is not None and not any(each.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        if each.name == "deslo-plugin":
            declared(requirements, each.extras, found)
        elif (name := each.name.lower().replace("_", "-")) not in found:
            found[name] = metadata.distribution(each.name)
            assert each.specifier.contains(found[name].version, prereleases=True), f"{each}: {found[name].version}"
            declared(found[name].requires or [], each.extras, found)
    return found


@pytest.fixture
def environment(wheel, tmp_path):
    """extra -> the Python of an environment that has the wheel and what the extra declares, linked from this one."""

    def make(extra: str) -> Path:
        venv.create(tmp_path, symlinks=True)
        (packages,) = (tmp_path / "lib").glob("python*/site-packages")
        zipfile.ZipFile(wheel).extractall(packages)
        (info,) = packages.glob("deslo_plugin-*.dist-info")
        for each in declared(metadata.PathDistribution(info).requires, {extra}, {}).values():
            for top in {path.parts[0] for path in each.files if path.parts[0] not in ("..", "__pycache__")}:
                if not (packages / top).exists():
                    (packages / top).symlink_to(Path(each.locate_file(top)))
        return tmp_path / "bin" / "python"

    return make


def run(python: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [python, *words],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=python.parents[1],
        env=environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )


def test_the_commands_of_the_readme_run_with_the_extra_cli_alone(environment):
    python = environment("cli")
    for words in (
        ["plan", "--config", "des-loc-adam", "--params", "350M", "--replicas", "4", "--gbps", "10", "--step-ms", "500"],
        ["simulate", "--config", "toy/des-loc", "--steps", "20", "--replicas", "2"],
    ):
        done = run(python, "-m", "deslo_plugin.cli", *words)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Warning" not in done.stderr
    next((python.parents[1] / "lib").glob("python*/site-packages/numpy")).unlink()  # only files of torch's need it
    for words in (
        ["doctor", "--config", "configs/des-loc-adam.json"],
        ["probe", "--replica-size", "1", "--mb", "1", "--rounds", "2"],
    ):
        done = run(python, *TORCHRUN, "-m", "deslo_plugin.cli", *words)
        assert "Numpy is not available" not in done.stdout + done.stderr, done.stderr[-2000:]
        assert "an existing file" not in done.stdout
        assert done.returncode == 0 or words[0] == "doctor", done.stderr[-2000:]
    done = run(python, "-m", "deslo_plugin.cli", "simulate", "--config", "des-loc-adm")
    assert done.returncode == 2 and "did you mean 'des-loc-adam'?" in done.stderr


@pytest.mark.parametrize("extra", ["deepspeed", "accelerate", "transformers"])
def test_an_extra_brings_what_its_framework_needs(environment, extra):
    done = run(environment(extra), "-c", f"import deslo_plugin, {extra}; print(deslo_plugin.kernels.update.native())")
    assert done.returncode == 0 and "python" in done.stdout.split(), done.stderr[-2000:]


def test_what_is_declared_is_what_is_supported():
    from deslo_plugin.frameworks.versions import SUPPORTED

    text = (ROOT / "pyproject.toml").read_text()
    for name, (low, below) in SUPPORTED.items():
        assert f'"{name}>={low}{f",<{below}" if below else ""}"' in text
