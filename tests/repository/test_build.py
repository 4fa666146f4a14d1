"""How the native module is built: what it links to, which GPUs it is for, and toolkits that do not fit.

nvcc and the compiler are scripts here, so nothing is compiled."""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPUS = {"12.0": "80 86 89 90", "12.6": "80 86 89 90", "12.8": "80 90 100 120", "13.0": "75 80 90 100 103 120"}
ELF_LOAD, ELF_DYNAMIC, NEEDED, STRTAB = 1, 2, 1, 5


def load_toolkit():
    spec = spec_from_file_location("cuda_toolkit", ROOT / "csrc" / "cuda" / "toolkit.py")
    sys.modules["cuda_toolkit"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit = load_toolkit()


@pytest.fixture
def fake_nvcc(tmp_path):
    """Makes the folder of a toolkit with an nvcc of a version, which "compiles" to empty files."""

    def make(version, *, runtime="lib64", gpus=None):
        folder = tmp_path / f"cuda-{version}"
        (folder / "bin").mkdir(parents=True)
        if runtime:
            (folder / runtime).mkdir(parents=True)
            (folder / runtime / "libcudart_static.a").touch()
        listed = "\\n".join(f"sm_{gpu}" for gpu in (gpus or GPUS[version]).split())
        write_script(
            folder / "bin" / "nvcc",
            'case "$*" in',
            f'  *--version*) echo "Cuda compilation tools, release {version}, V{version}.1" ;;',
            f'  *--list-gpu-code*) printf "{listed}\\n" ;;',
            f'  *--dryrun*) echo "#\\$ TOP={folder}/bin/.." >&2 ;;',
            f'  *) echo "$*" >> {folder}/calls; for last; do :; done; touch "$last" ;;',
            "esac",
        )
        return folder

    return make


def write_script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def read(folder):
    return toolkit.read_toolkit(str(folder / "bin" / "nvcc"))


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("12.6", ["8.0", "9.0+PTX"]),
        ("12.8", ["8.0", "9.0", "10.0", "12.0+PTX"]),
        ("13.0", ["8.0", "9.0", "10.0", "12.0+PTX"]),
    ],
)
def test_a_toolkit_builds_for_the_gpus_that_it_knows(fake_nvcc, version, expected):
    assert toolkit.choose_architectures(read(fake_nvcc(version))) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("8.0 10.0", ["8.0", "10.0"]),
        (" 9.0 ; ", ["9.0"]),
        ("5.0 6.1 7.5 9.0+PTX", ["7.5", "9.0+PTX"]),  # as images for many packages have it
    ],
)
def test_torch_cuda_arch_list_decides(fake_nvcc, asked, expected):
    assert toolkit.choose_architectures(read(fake_nvcc("13.0")), asked) == expected


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("Hopper", "'8.0;9.0[+]PTX', got 'Hopper'"),
        ("sm_90", "got 'sm_90'"),
        ("9.0 13.0", "that nvcc 13.0 knows from 7.0 on, got '9.0 13.0'; .* a toolkit that knows 13.0"),
        ("5.0", "got '5.0'"),
    ],
)
def test_a_list_that_cannot_be_built_is_refused(fake_nvcc, asked, words):
    with pytest.raises(toolkit.ToolkitError, match=f"^TORCH_CUDA_ARCH_LIST: expected .*{words}"):
        toolkit.choose_architectures(read(fake_nvcc("13.0")), asked)


def test_ptx_is_made_for_those_that_ask_for_it():
    assert toolkit.code_flags(["8.0", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_a_toolkit_that_is_too_old_for_the_kernels_is_refused(fake_nvcc):
    with pytest.raises(toolkit.ToolkitError, match="expected CUDA 12.1 or newer, got 12.0.*set CUDA_HOME"):
        read(fake_nvcc("12.0"))


@pytest.mark.parametrize(
    ("version", "torch_cuda", "fits"),
    [
        ("12.6", "12.8", True),
        ("12.8", "12.6", True),
        ("12.8", "13.0", True),
        ("13.0", None, True),
        ("13.0", "12.8", False),
    ],
)
def test_a_runtime_that_may_be_too_new_for_the_driver_is_refused(fake_nvcc, version, torch_cuda, fits):
    found = read(fake_nvcc(version))
    if fits:
        return toolkit.check_runtime(found, torch_cuda)
    with pytest.raises(toolkit.ToolkitError, match=r"expected CUDA 12 as torch has \(12.8\), got 13.0"):
        toolkit.check_runtime(found, torch_cuda)


@pytest.mark.parametrize("place", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_the_runtime_is_found_where_packagers_put_it(fake_nvcc, place):
    folder = fake_nvcc("13.0", runtime=place)
    assert toolkit.runtime_folder(read(folder)).resolve() == folder / place


def test_a_toolkit_without_a_static_runtime_says_what_to_install(fake_nvcc):
    with pytest.raises(toolkit.ToolkitError, match="libcudart_static.a .*found none; install"):
        toolkit.runtime_folder(read(fake_nvcc("13.0", runtime=None)))


def test_cuda_home_comes_before_path(fake_nvcc, monkeypatch):
    home, other = fake_nvcc("12.8"), fake_nvcc("13.0")
    environ = {"PATH": f"{other}/bin"}
    assert toolkit.find_nvcc(environ) == f"{other}/bin/nvcc"
    assert toolkit.find_nvcc(environ | {"CUDA_HOME": str(home)}) == f"{home}/bin/nvcc"


@pytest.fixture
def build(tmp_path):
    """Runs setup.py as on a machine with this toolkit and a torch of ``torch_cuda``; the compiler is a script that
    writes its arguments down. Returns the process and the arguments of the links that came about."""

    def run(toolkit_folder, *, native="auto", torch_cuda="13.0", fails_to_link="nothing", **environ):
        compiler, links = tmp_path / "compiler", tmp_path / "links"
        write_script(
            compiler,
            'case " $* " in',
            f'  *" {fails_to_link} "*) echo "ld: cannot find it" >&2; exit 1 ;;',
            f'  *" -shared "*) echo "$*" >> {links} ;;',
            "esac",
            'while [ "$1" != -o ]; do shift; done; touch "$2"',
        )
        code = (
            f"import runpy, sys, torch; torch.version.cuda = {torch_cuda!r}; "
            f"sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path / 'lib')!r}, '--build-temp', "
            f"{str(tmp_path / 'temp')!r}]; runpy.run_path('setup.py', run_name='__main__')"
        )
        compilers = dict.fromkeys(("CC", "CXX"), str(compiler)) | dict.fromkeys(
            ("LDSHARED", "LDCXXSHARED"), f"{compiler} -shared"
        )
        left = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=300,
            env=left | compilers | {"CUDA_HOME": str(toolkit_folder), "DESLO_NATIVE": native} | environ,
        )
        return done, links.read_text().splitlines() if links.exists() else []

    return run


def test_a_build_with_cuda_links_its_runtime_and_torchs_cuda_part(build, fake_nvcc):
    folder = fake_nvcc("13.0")
    done, (link,) = build(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "-lcudart_static" in link and f"-L{folder}" in link
    assert "-ltorch" in link.split("-Wl,--no-as-needed")[1].split()  # in front of the flag a linker may drop it
    calls = (folder / "calls").read_text()
    sources = {path.name for path in ROOT.glob("csrc/cuda/*.cu")}
    assert len(sources) >= 4 and all(f"csrc/cuda/{name}" in calls for name in sources)
    assert "compute_120,code=compute_120" in calls and "--threads=0" in calls


def test_a_cuda_link_that_fails_leaves_the_cpu_kernels(build, fake_nvcc):
    done, (link,) = build(fake_nvcc("13.0"), fails_to_link="-lcudart_static")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "-lcudart_static" not in link and ".cu.o" not in link and "averages.o" in link
    assert "the CUDA kernels were not built, CUDA tensors will run on torch's operators" in done.stderr
    done, links = build(fake_nvcc("12.8"), native="cuda", fails_to_link="-lcudart_static")
    assert done.returncode != 0 and len(links) == 1


@pytest.mark.parametrize(
    ("version", "environ", "words"),
    [
        ("12.0", {}, "expected CUDA 12.1 or newer"),
        ("13.0", {"torch_cuda": "12.8"}, "expected CUDA 12 as torch has (12.8), got 13.0"),
        ("12.6", {"TORCH_CUDA_ARCH_LIST": "12.0"}, "a toolkit that knows 12.0"),
    ],
    ids=["old", "new", "gpus"],
)
def test_a_toolkit_that_does_not_fit_is_skipped_aloud_or_refused(build, fake_nvcc, version, environ, words):
    folder = fake_nvcc(version)
    done, links = build(folder, **environ)
    assert done.returncode == 0 and words in done.stderr and len(links) == 1
    done, links = build(folder, native="cuda", **environ)
    assert done.returncode != 0 and words in done.stderr and len(links) == 1


def needed(path):
    """The libraries that the loader brings for a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    number = lambda at, size=8: int.from_bytes(data[at : at + size], "little")
    headers = [number(32) + index * number(54, 2) for index in range(number(56, 2))]  # of the segments
    segments = [(number(at, 4), *(number(at + 8 * field) for field in (1, 2, 4))) for at in headers]
    loaded = [segment[1:] for segment in segments if segment[0] == ELF_LOAD]
    in_file = lambda address: next(
        address - begin + offset for offset, begin, size in loaded if begin <= address < begin + size
    )
    start, size = next((offset, size) for kind, offset, _, size in segments if kind == ELF_DYNAMIC)
    entries = [(number(at), number(at + 8)) for at in range(start, start + size, 16)]
    strings = in_file(next(value for tag, value in entries if tag == STRTAB))
    names = [strings + value for tag, value in entries if tag == NEEDED]
    return [data[at : data.index(b"\0", at)].decode() for at in names]


@pytest.mark.skipif(sys.platform != "linux", reason="of ELF files")
def test_the_module_brings_torchs_cuda_part(kernels):
    """libtorch.so brings libtorch_cuda.so, where the current stream is asked for."""
    assert "libtorch.so" in needed(Path(kernels.__file__))


def test_a_source_release_has_what_a_build_needs(tmp_path):
    tree = tmp_path / "checkout"
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "csrc" / "cuda" / "__pycache__").mkdir()
    (tree / "csrc" / "cuda" / "__pycache__" / "toolkit.cpython-310.pyc").touch()
    shutil.copytree(ROOT / "configs", tree / "configs")
    (tree / "deslo_plugin").mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("__init__.py", "version.py", "py.typed"):
        shutil.copy(ROOT / "deslo_plugin" / name, tree / "deslo_plugin")
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('out'))"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True, timeout=300)
    (archive,) = (tree / "out").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"}
    assert (
        {"csrc/rules.h", "csrc/cpu/update.cpp", "csrc/cuda/toolkit.py", "csrc/torch/bindings.cpp"} <= sources <= names
    )
    assert not any(name.endswith(".pyc") for name in names)
