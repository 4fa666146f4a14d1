"""Builds deslo_plugin._C from csrc/ against the torch that is installed; everything else is in pyproject.toml.

DESLO_NATIVE = auto  what can be built: CUDA with nvcc and a CUDA torch, nothing without a C++ compiler (default)
               cpu   the CPU kernels, or an error
               cuda  the CPU and CUDA kernels, or an error
               off   nothing: the package runs on torch's operators

CUDA code is made for the GPUs that csrc/cuda/toolkit.py lists and nvcc knows, or for those of TORCH_CUDA_ARCH_LIST.
An isolated build sees no torch, and so builds no kernels: use pip install --no-build-isolation.
"""

import copy
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NATIVE = os.environ.get("DESLO_NATIVE", "auto")
CPU_SOURCES = ["csrc/cpu/update.cpp", "csrc/cpu/averages.cpp", "csrc/cpu/quantize.cpp"]
TORCH_ABI = "0x020a000000000000"  # torch 2.10: the oldest that the binary runs on
PYTHON_ABI = "0x030a0000"

# One rounding per operation, so that all instruction sets agree; errno and floating-point traps are never read.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
]
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprfchw", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mprfchw"],
}


def load_toolkit():
    """The module csrc/cuda/toolkit.py, which lies in no package and on no path."""
    spec = importlib.util.spec_from_file_location(
        "cuda_toolkit", Path(__file__).parent / "csrc" / "cuda" / "toolkit.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_toolkit = load_toolkit()


class BuildPackage(build_py):
    """A wheel has the folder configs/ inside the package; a checkout, and what is installed from it with -e, uses it as
    it lies."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib) / "deslo_plugin" / "configs", dirs_exist_ok=True)


class BuildKernels(build_ext):
    """Compiles csrc/cpu/*.cpp once per instruction set, csrc/cuda/*.cu with nvcc, and links them into one module."""

    def build_extension(self, extension):
        self.force = True  # the date of a file does not tell with which settings it was built
        try:
            if NATIVE not in ("auto", "cpu", "cuda"):
                raise ValueError(f"DESLO_NATIVE: expected auto, cpu, cuda or off, got {NATIVE!r}")
            self._add_torch(extension)
            self._add_cpu(extension)
            if not self._build_with_cuda(extension):
                super().build_extension(extension)
        except Exception as error:
            if NATIVE != "auto":
                raise
            warnings.warn(
                f"the native kernels were not built, the package will run on torch's operators: {error}", stacklevel=2
            )
            self.extensions.remove(extension)

    def _build_with_cuda(self, extension):
        """Whether it was wanted and could be done. The CPU kernels do not depend on it."""
        nvcc = cuda_toolkit.find_nvcc(os.environ)
        if NATIVE == "cpu" or (NATIVE == "auto" and not (nvcc and self.torch_cuda)):
            return False
        try:
            if not nvcc:
                raise FileNotFoundError("DESLO_NATIVE=cuda: expected nvcc in CUDA_HOME/bin or on PATH, found none")
            with_cuda = copy.deepcopy(extension)
            self._add_cuda(with_cuda, nvcc)
            super().build_extension(with_cuda)
            return True
        except Exception as error:
            if NATIVE == "cuda":
                raise
            warnings.warn(
                f"the CUDA kernels were not built, CUDA tensors will run on torch's operators: {error}", stacklevel=2
            )
            return False

    def _add_torch(self, extension):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        extension.include_dirs += include_paths()
        extension.library_dirs += library_paths()
        extension.libraries += ["torch", "torch_cpu", "c10"]
        extension.define_macros += [("TORCH_TARGET_VERSION", TORCH_ABI), ("Py_LIMITED_API", PYTHON_ABI)]
        self.torch_cuda = torch.version.cuda

    def _add_cpu(self, extension):
        x86 = platform.machine() in ("x86_64", "AMD64")
        for isa, flags in {"baseline": [], **(X86 if x86 else {})}.items():
            extension.extra_objects += self.compiler.compile(
                CPU_SOURCES,
                output_dir=f"{self.build_temp}/{isa}",
                macros=[("DESLO_ISA", isa)],
                extra_postargs=FLAGS + flags,
                depends=extension.depends,
            )

    def _add_cuda(self, extension, nvcc):
        toolkit = cuda_toolkit.read_toolkit(nvcc)
        cuda_toolkit.check_runtime(toolkit, self.torch_cuda)
        architectures = cuda_toolkit.choose_architectures(toolkit, os.environ.get("TORCH_CUDA_ARCH_LIST"))
        extension.library_dirs.append(str(cuda_toolkit.runtime_folder(toolkit)))
        flags = [*cuda_toolkit.FLAGS, *cuda_toolkit.code_flags(architectures)]
        for source in sorted(Path("csrc/cuda").glob("*.cu")):
            target = Path(self.build_temp) / f"{source.name}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([nvcc, *flags, "-c", source, "-o", target], check=True)
            extension.extra_objects.append(str(target))
        extension.define_macros.append(("DESLO_CUDA", f'"{" ".join(architectures)}"'))
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]


kernels = Extension(
    "deslo_plugin._C",
    ["csrc/torch/bindings.cpp"],
    extra_compile_args=FLAGS,
    # libtorch brings the CUDA part of torch, and linkers drop it, since nothing here refers to it. The flag holds for
    # what stands behind it
    extra_link_args=["-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else [],
    py_limited_api=True,
    depends=[str(path) for path in sorted(Path("csrc").rglob("*.*"))],
)
setup(
    ext_modules=[] if NATIVE == "off" else [kernels],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if NATIVE != "off" else {},
)
