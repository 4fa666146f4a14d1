"""``make matrix``: every row of docs/versions.md in an environment of its own, with one wheel of ours, against the
float64 oracle.

    make matrix FOLDER=/some/folder ARGS="--row 'torch 2.10.0'"

An environment is made with pip as it is configured on this machine (where CPU builds of torch come from is for you to
say, as in PIP_EXTRA_INDEX_URL), and removed after its row. The script calls itself inside each of them.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, BEGIN, END = ROOT / "docs" / "versions.md", "<!-- make matrix -->\n", "<!-- end -->\n"
CASES = {
    "plain": "plain",
    "ddp": "DDP",
    "fsdp": "FSDP2",
    "hsdp": "HSDP",
    "zero-2": "ZeRO-2",
    "zero-3": "ZeRO-3",
    "accelerate": "Accelerate FSDP2",
}
TORCH, DEEPSPEED = (
    ("2.15.0", "2.14.1", "2.13.0", "2.12.1", "2.11.0", "2.10.0", "2.9.1"),
    ("0.19.0", "0.18.0", "0.17.6", "0.16.0"),
)
REFERENCE = {"torch": "2.13.0", "deepspeed": "0.19.8", "accelerate": "1.15.0"}
ROWS = {
    **{f"torch {version}": {"torch": version} for version in TORCH},
    **{f"DeepSpeed {version}": {"deepspeed": version} for version in DEEPSPEED},
    "Accelerate 1.10.1": {"accelerate": "1.10.1"},
}
STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where environments are made, one after the other")
    parser.add_argument("--row", action="append", choices=ROWS, help="only these")
    parser.add_argument("--case", action="append", choices=CASES, help="only these")
    parser.add_argument("--inside", action="store_true", help="run the cases in this environment and print JSON")
    given = parser.parse_args()
    cases = given.case or list(CASES)
    if given.inside:
        print(json.dumps(inside(cases)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", given.folder, ROOT],
        check=True,
    )
    wheel = max(given.folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    for row in given.row or ROWS:
        write(row, run(row, given.folder / "environment", wheel, cases))


def run(row: str, folder: Path, wheel: Path, cases: list[str]) -> dict[str, str]:
    """Case -> its figure, or the reason why there is none."""
    pins = REFERENCE | ROWS[row]
    venv.create(folder, with_pip=True, clear=True)
    python, pip = folder / "bin" / "python", [folder / "bin" / "pip", "-q", "install"]
    try:
        for wanted in (
            [f"torch=={pins['torch']}", "numpy", "setuptools", "wheel", "pyyaml", "pytest", "hypothesis", "psutil"],
            ["--no-build-isolation", *(f"{name}=={pins[name]}" for name in ("deepspeed", "accelerate"))],
            ["--no-deps", wheel],
        ):
            made = subprocess.run([*pip, *wanted], capture_output=True, text=True)
            if made.returncode:
                return dict.fromkeys(cases, f"pip: {made.stderr.strip().splitlines()[-1]}")
        asked = [python, __file__, "--inside", *(word for case in cases for word in ("--case", case))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(asked, capture_output=True, text=True, cwd=folder, env=environment)
        if done.returncode:
            return dict.fromkeys(cases, done.stderr.strip().splitlines()[-1])
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)


def inside(cases: list[str]) -> dict[str, str]:
    """Four ranks, as the tests have them; the largest distance of any state from the oracle after ``STEPS`` steps."""
    from worlds import Processes

    found = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            world = Processes(4, Path(folder))
            try:
                found[case] = f"{distance(world, case):.0e}"
            except Exception as error:
                found[case] = str(error).strip().splitlines()[-1][:160]
            finally:
                world.close()
    return found


def distance(world, case: str) -> float:
    import jobs
    import torch_jobs
    from oracle import blocks
    from theory import ACCUMULATION, CLIP, RULES, oracle_states

    s = RULES["des-loc-adam"]
    if case.startswith("zero"):
        ds = blocks(s, replica_size=2) | {
            "zero_optimization": {"stage": int(case[-1])},
            "gradient_clipping": CLIP,
            "gradient_accumulation_steps": ACCUMULATION,
        }
        results = world.run(jobs.run, ds, STEPS, timeout=600)
    elif case == "accelerate":
        import accelerate_jobs

        results = world.run(
            accelerate_jobs.run, "fsdp", "before", "DesLoc", blocks(s, replica_size=2), STEPS, timeout=600
        )
    else:
        size = {"plain": "auto", "ddp": 2, "fsdp": "auto", "hsdp": "auto"}[case]
        results = world.run(torch_jobs.run, case, blocks(s, replica_size=size), STEPS, timeout=600)
    theory = oracle_states(s, STEPS, replicas=4 if case == "plain" else 2)
    return max(
        float((result["states"][state][name].double() - expected).abs().max())
        for rank, result in enumerate(results)
        for state, tensors in theory[rank * len(theory) // len(results)].items()
        if state in result["states"]
        for name, expected in tensors.items()
    )


def write(row: str, found: dict[str, str]) -> None:
    """Puts the row into the table of docs/versions.md, in place of the one it had."""
    text = PAGE.read_text()
    head, table, tail = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", text)
    lines = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    cells = (found.get(case, "not run").replace("|", "/") for case in CASES)
    lines[row] = f"| {row} | {' | '.join(cells)} |"
    order = [name for name in ROWS if name in lines]
    PAGE.write_text(
        head + BEGIN + "\n".join([*table.splitlines()[:2], *(lines[name] for name in order)]) + "\n" + END + tail
    )
    print(lines[row], flush=True)


if __name__ == "__main__":
    main()
