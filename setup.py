"""Builds deslo_plugin._C from csrc/ against the torch that is installed; everything else is in pyproject.toml.

DESLO_NATIVE = auto  what can be built: CUDA with nvcc and a CUDA torch, nothing without a C++ compiler (default)
               cpu   the CPU kernels, or an error
               cuda  the CPU and CUDA kernels, or an error
               off   nothing: the package runs on torch's operators

An isolated build sees no torch, and so builds no kernels: use pip install --no-build-isolation.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NATIVE = os.environ.get("DESLO_NATIVE", "auto")
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
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--ftz=true",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
    *(f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)),
    "-gencode=arch=compute_100,code=compute_100",
]


class BuildPackage(build_py):
    """A wheel has the folder configs/ inside the package; a checkout, and what is installed from it with -e, uses it as
    it lies."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib) / "deslo_plugin" / "configs", dirs_exist_ok=True)


class BuildKernels(build_ext):
    """Compiles csrc/cpu*.cpp once per instruction set, csrc/*.cu with nvcc, and links them into one module."""

    def build_extension(self, extension):
        try:
            if NATIVE not in ("auto", "cpu", "cuda"):
                raise ValueError(f"DESLO_NATIVE: expected auto, cpu, cuda or off, got {NATIVE!r}")
            self._add_torch(extension)
            self._add_cpu(extension)
            self._add_cuda(extension)
            super().build_extension(extension)
        except Exception as error:
            if NATIVE != "auto":
                raise
            warnings.warn(
                f"the native kernels were not built, the package will run on torch's operators: {error}", stacklevel=2
            )
            self.extensions.remove(extension)

    def _add_torch(self, extension):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        extension.include_dirs += include_paths()
        extension.library_dirs += library_paths()
        extension.libraries += ["torch", "torch_cpu", "c10"]
        extension.define_macros += [("TORCH_TARGET_VERSION", TORCH_ABI), ("Py_LIMITED_API", PYTHON_ABI)]
        self.cuda_torch = torch.version.cuda is not None

    def _add_cpu(self, extension):
        x86 = platform.machine() in ("x86_64", "AMD64")
        for isa, flags in {"baseline": [], **(X86 if x86 else {})}.items():
            extension.extra_objects += self.compiler.compile(
                ["csrc/cpu.cpp", "csrc/cpu_average.cpp"],
                output_dir=f"{self.build_temp}/{isa}",
                macros=[("DESLO_ISA", isa)],
                extra_postargs=FLAGS + flags,
                depends=extension.depends,
            )

    def _add_cuda(self, extension):
        nvcc = shutil.which("nvcc") or shutil.which(
            "nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
        )
        if NATIVE == "cpu" or (NATIVE == "auto" and not (nvcc and self.cuda_torch)):
            return
        try:
            if not nvcc:
                raise FileNotFoundError("DESLO_NATIVE=cuda: expected nvcc on PATH or in CUDA_HOME/bin, found none")
            targets = {f"csrc/{name}.cu": Path(self.build_temp) / f"{name}.cu.o" for name in ("cuda", "drift", "land")}
            for source, target in targets.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run([nvcc, *CUDA_FLAGS, "-c", source, "-o", target], check=True)
            # nvcc on PATH may be a script that stands elsewhere than its toolkit
            plan = subprocess.run(
                [nvcc, "--dryrun", "-c", "csrc/cuda.cu"], capture_output=True, text=True, check=True
            ).stderr
            toolkit = re.search(r"TOP=(.*)", plan)[1]
        except Exception as error:
            if NATIVE == "cuda":
                raise
            warnings.warn(
                f"the CUDA kernels were not built, CUDA tensors will run on torch's operators: {error}", stacklevel=2
            )
            return
        extension.extra_objects += map(str, targets.values())
        extension.define_macros.append(("DESLO_CUDA", None))
        extension.library_dirs.append(f"{toolkit}/lib64")
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]


kernels = Extension(
    "deslo_plugin._C",
    ["csrc/module.cpp"],
    extra_compile_args=FLAGS,
    # the CUDA part of torch comes through libtorch
    extra_link_args=["-Wl,--no-as-needed"] if sys.platform == "linux" else [],
    py_limited_api=True,
    depends=[str(path) for path in sorted(Path("csrc").iterdir())],
)
setup(
    ext_modules=[] if NATIVE == "off" else [kernels],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if NATIVE != "off" else {},
)
