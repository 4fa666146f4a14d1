"""What nvcc makes of the CUDA kernels, for machines without a GPU: registers, spills, width of accesses.

    python benchmarks/cuda_build.py [--nvcc nvcc] [--cuobjdump cuobjdump]

Compiles csrc/*.cu as setup.py does, and reads what ptxas says and what cuobjdump shows; cuobjdump is in the CUDA
toolkit, or comes from pip (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). Writes benchmarks/results/cuda-build.txt.
"""

import argparse
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "cuda-build.txt"
ARCHITECTURES = (80, 90, 100)
FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--ftz=true",
    "-Xptxas",
    "-v",
    *(f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES),
    "-gencode=arch=compute_100,code=compute_100",
]
ACCESSES = {
    "128-bit loads": r"LDG\.\S*128",
    "stores": r"STG\.\S*128",
    "64-bit loads": r"LDG\.\S*64",
    "stores ": r"STG\.\S*64",
    "local": r"\b(LDL|STL)\b",
}
HEAD = """CUDA kernels as {version} compiles them. They have NOT RUN on a GPU: no time or bandwidth here,
only what the compiler says.

$ python benchmarks/cuda_build.py      (nvcc {flags} -c csrc/NAME.cu; cuobjdump -sass NAME.o)

N = 0: any number of momenta, one after the other, the loop unrolled by the compiler. states: their dtype. where:
whether step count and rate come by value, or were prepared on the device from tensors. 128-bit, 64-bit: accesses of
the path for whole, aligned elements (16-bit formats take 64 bits; so does a pointer or a pair of constants). local:
loads and stores of spilled registers; prepare is one thread, and its local memory no spill but an array.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--cuobjdump", default="cuobjdump")
    tools = parser.parse_args()
    kernels: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(ROOT.glob("csrc/*.cu")):
            built = Path(folder) / f"{source.stem}.o"
            said = run(tools.nvcc, *FLAGS, "-c", str(source), "-o", str(built))
            for name, sm, text in re.findall(r"entry function '(\S+)' for 'sm_(\d+)'(.*?Used .*?)\n", said, re.S):
                spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
                kernels[sm, name] |= {"registers": int(re.search(r"Used (\d+)", text)[1]), "spilled bytes": spilled}
            for sm, part in re.findall(
                r"arch = sm_(\d+)(.*?)(?=arch = sm_|\Z)", run(tools.cuobjdump, "-sass", str(built)), re.S
            ):
                for name, code in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", part, re.S):
                    kernels[sm, name] |= {what: len(re.findall(pattern, code)) for what, pattern in ACCESSES.items()}
    names = dict(zip([name for _, name in kernels], run("c++filt", *(name for _, name in kernels)).splitlines()))
    rows = sorted((int(sm), *described(names[name]), *counts.values()) for (sm, name), counts in kernels.items())
    version = re.search(r"release (\S+),", run(tools.nvcc, "--version"))[1]
    columns = ["arch", "kernel", "N", "states", "where", "registers", "spilled bytes", *ACCESSES]
    cells = [columns, *([f"sm_{sm}", *map(str, row)] for sm, *row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    table = "\n".join(
        "  ".join(cell.ljust(w) if i < 5 else cell.strip().rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    )
    OUT.write_text(HEAD.format(version=f"nvcc {version}", flags=" ".join(FLAGS)) + table + "\n")


def described(name: str) -> tuple[str, str, str, str]:
    """(kernel, N, dtype of states, where its constants are) of a demangled name."""
    if update := re.search(r"update<deslo::(\w+), (\d+), (\S+), (.*?)>\(", name):
        rule, momenta, state, source = update.groups()
        return rule.lower(), momenta, dtype(state), "device" if source.endswith("*") else "value"
    kernel, state = re.search(r"namespace\)::(\w+)(?:<([^>]+)>)?\(", name).groups()
    return kernel, "", dtype(state) if state else "", ""


def dtype(name: str) -> str:
    return {"float": "float32", "double": "float64"}.get(name, "bfloat16")


def run(*command: str) -> str:
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


if __name__ == "__main__":
    main()
