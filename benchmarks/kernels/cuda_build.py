"""``make cuda-build``: builds the module with CUDA into build/cuda/, as a release has it, and looks at what came out,
on machines without a GPU.

    python -m benchmarks.kernels.cuda_build [--cuobjdump cuobjdump]

The checkout's own module stays as it is. Ends with 1 if a kernel lacks code for a GPU, if the loader would bring other
libraries than it should, or if the module asks torch for more than TORCH_ABI has. With cuobjdump, which is in the CUDA
toolkit or comes from pip (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), it also writes what nvcc made of each kernel to
benchmarks/results/cuda-build.txt. Takes minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "cuda-build.txt"
BUILT = ROOT / "build" / "cuda"
MODULE = BUILT / "deslo_plugin" / "_C.abi3.so"
GPUS, PTX = ("80", "90", "100", "120"), "120"
TORCH = (2, 10)  # as setup.py's TORCH_ABI
BRINGS = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
MAY_BRING = BRINGS | {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
ACCESSES = {
    "128-bit loads": r"LDG\.\S*128",
    "stores": r"STG\.\S*128",
    "64-bit loads": r"LDG\.\S*64",
    "stores ": r"STG\.\S*64",
    "local": r"\b(LDL|STL)\b",
}
HEAD = """CUDA kernels as nvcc {version} compiles them: no time or bandwidth here, only what compiler and linker say.

$ make cuda-build

{found}

N = 0: any number of momenta, one after the other, the loop unrolled by the compiler. states: their dtype. where:
whether step count and rate come by value, or were prepared on the device from tensors. 128-bit, 64-bit: accesses of
the path for whole, aligned elements (16-bit formats take 64 bits; so does a pointer or a pair of constants). local:
loads and stores of spilled registers; prepare is one thread, and its local memory no spill but an array.

"""
Kernels = dict[tuple[str, str], dict[str, int]]  # (GPU, mangled name) -> what was counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cuobjdump", default="cuobjdump")
    cuobjdump = shutil.which(parser.parse_args().cuobjdump)
    kernels = build()
    wrong = [*code_is_missing(kernels, cuobjdump), *libraries_are_wrong(), *symbols_are_wrong()]
    if cuobjdump:
        count_accesses(kernels, cuobjdump)
    found = summary(kernels)
    print(found)
    if cuobjdump:
        version = re.search(r"release (\S+),", run("nvcc", "--version"))[1]
        OUT.write_text(HEAD.format(version=version, found=found) + table(kernels) + "\n")
    else:
        print(f"cuobjdump: expected in PATH for {OUT.relative_to(ROOT)}, found none; that file is as it was")
    sys.exit("\n".join(wrong) or None)


def build() -> Kernels:
    """The module by setup.py, and what ptxas says about registers."""
    shutil.rmtree(BUILT, ignore_errors=True)  # objects of sources that were moved would be counted too
    environ = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    # one at a time, so that what ptxas says of several GPUs is not mixed
    environ |= {"DESLO_NATIVE": "cuda", "NVCC_APPEND_FLAGS": "-Xptxas -v --threads 1"}
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(BUILT), "--build-temp", str(BUILT / "objects")]
    said = run(sys.executable, *command, cwd=ROOT, env=environ)
    kernels: Kernels = defaultdict(dict)
    for name, sm, text in re.findall(r"entry function '(\S+)' for 'sm_(\d+)'(.*?Used .*?)\n", said, re.S):
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        kernels[sm, name] |= {"registers": int(re.search(r"Used (\d+)", text)[1]), "spilled bytes": spilled}
    return kernels


def code_is_missing(kernels: Kernels, cuobjdump: str | None) -> Iterator[str]:
    names = {sm: {name for each, name in kernels if each == sm} for sm in {sm for sm, _ in kernels}}
    for sm in GPUS:
        for name in sorted(set().union(*names.values()) - names.get(sm, set())):
            yield f"sm_{sm}: no code for {name}"
    if not names:
        yield "ptxas named no kernel"
    if cuobjdump:
        sources = len(list(ROOT.glob("csrc/cuda/*.cu")))
        listed = run(cuobjdump, "--list-elf", str(MODULE)) + run(cuobjdump, "--list-ptx", str(MODULE))
        for kind, sm in [*(("cubin", sm) for sm in GPUS), ("ptx", PTX)]:
            parts = len(re.findall(rf"\.sm_{sm}\.{kind}\b", listed))
            if parts != sources:
                yield f"{MODULE.name}: expected {sources} files of {kind} for sm_{sm}, one for each source, got {parts}"


def libraries_are_wrong() -> Iterator[str]:
    needed = set(libraries())
    for name in sorted(BRINGS - needed):
        yield f"{MODULE.name}: expected {name} in NEEDED: without it torch's CUDA part may be missing"
    for name in sorted(needed - MAY_BRING):
        yield f"{MODULE.name}: {name} in NEEDED, which a machine that runs torch may lack"


def libraries() -> list[str]:
    return re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", str(MODULE)))


def symbols_are_wrong() -> Iterator[str]:
    """Of torch only functions of its stable C interface, none younger than TORCH; of Python only the limited API's."""
    headers = [
        (Path(include_paths()[0]) / "torch" / "csrc" / name).read_text()
        for name in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")
    ]
    for name in of_torch():
        since = next((version for text in headers if (version := declared_since(text, name))), None)
        if since is None:
            yield f"{MODULE.name}: {name} is not in torch's stable interface"
        elif since > TORCH:
            yield f"{MODULE.name}: {name} is younger than torch {'.'.join(map(str, TORCH))}"


def of_torch() -> list[str]:
    """What the module leaves to others, without what Python, C and C++ bring: torch too exports parts of the latter."""
    undefined = re.findall(r"^\s+[Uu] (\S+)$", run("nm", "-D", "--undefined-only", str(MODULE)), re.M)
    return [name for name in undefined if "@" not in name and not re.match("_?Py|_ZN?K?St", name)]


def declared_since(header: str, name: str) -> tuple[int, int] | None:
    """The torch whose interface has the function first; (0, 0) without a condition, None if it is not declared."""
    conditions: list[tuple[int, int]] = []
    for line in header.splitlines():
        if line.startswith("#if"):
            version = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_", line)
            conditions.append((int(version[1]), int(version[2])) if version else (0, 0))
        elif line.startswith("#endif"):
            conditions.pop()
        elif re.search(rf"\b{name}\(", line):
            return max(conditions, default=(0, 0))
    return None


def count_accesses(kernels: Kernels, cuobjdump: str) -> None:
    for built in sorted((BUILT / "objects").glob("*.cu.o")):
        for sm, part in re.findall(r"arch = sm_(\d+)(.*?)(?=arch = sm_|\Z)", run(cuobjdump, "-sass", str(built)), re.S):
            for name, code in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", part, re.S):
                kernels[sm, name] |= {what: len(re.findall(pattern, code)) for what, pattern in ACCESSES.items()}


def summary(kernels: Kernels) -> str:
    lines = [f"{MODULE.relative_to(ROOT)}: {MODULE.stat().st_size / 1e6:.1f} MB, NEEDED {' '.join(libraries())}"]
    versions = set(re.findall(r"@((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)", run("nm", "-D", "--undefined-only", str(MODULE))))
    youngest: dict[str, str] = {}
    for each in sorted(versions, key=lambda each: [int(part) for part in each.split("_")[1].split(".")]):
        youngest[each.split("_")[0]] = each
    lines.append(f"runs from torch {'.'.join(map(str, TORCH))} on, with {' '.join(youngest.values())}")
    for sm in GPUS:
        counts = [each for (gpu, _), each in kernels.items() if gpu == sm]
        registers, spilled = ([each[what] for each in counts] for what in ("registers", "spilled bytes"))
        lines.append(
            f"sm_{sm}: {len(counts)} kernels, {min(registers)} to {max(registers)} registers, "
            f"{sum(map(bool, spilled))} with spills ({sum(spilled)} bytes)"
        )
    return "\n".join(lines)


def table(kernels: Kernels) -> str:
    names = dict(zip([name for _, name in kernels], run("c++filt", *(name for _, name in kernels)).splitlines()))
    rows = sorted((int(sm), *described(names[name]), *counts.values()) for (sm, name), counts in kernels.items())
    columns = ["arch", "kernel", "N", "states", "where", "registers", "spilled bytes", *ACCESSES]
    cells = [columns, *([f"sm_{sm}", *map(str, row)] for sm, *row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 5 else cell.strip().rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    )


def described(name: str) -> tuple[str, str, str, str]:
    """(kernel, N, dtype of states, where its constants are) of a demangled name."""
    if update := re.search(r"update<deslo::(\w+), (\d+), (\S+), (.*?)>\(", name):
        rule, momenta, state, source = update.groups()
        return rule.lower(), momenta, dtype(state), "device" if source.endswith("*") else "value"
    if few := re.search(r"namespace\)::(\w+)<deslo::RecordFormat<(\d+), (\d+), (\w+)>", name):
        return few[1], "", f"{few[2]} bits, {few[3]}{', rooted' * (few[4] == 'true')}", ""
    kernel, state = re.search(r"namespace\)::(\w+)(?:<([^>]+)>)?\(", name).groups()
    return kernel, "", dtype(state) if state else "", ""


def dtype(name: str) -> str:
    return {"float": "float32", "double": "float64"}.get(name, "bfloat16")


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]}: failed with {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
