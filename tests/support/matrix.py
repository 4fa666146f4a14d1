"""``make matrix``: every row of docs/versions.md in an environment of its own, with one wheel of ours, against the
float64 oracle.

    make matrix FOLDER=/some/folder ARGS="--row 'torch 2.10.0'"

An environment is made with pip as it is configured on this machine (where CPU builds of torch come from is for you to
say, as in PIP_EXTRA_INDEX_URL; the CUDA builds do, and take 8 GB each), and removed after its row. The script calls
itself inside each of them. A row that pip cannot install ends the run and leaves the table as it was. Interpreters are
the one that runs this script and those of PATH, as ``python3.12``.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, BEGIN, END = ROOT / "docs" / "versions.md", "<!-- make matrix -->\n", "<!-- end -->\n"
CASES = {
    "kernels": "kernels",
    "plain": "plain",
    "ddp": "DDP",
    "fsdp": "FSDP2",
    "hsdp": "HSDP",
    "zero-2": "ZeRO-2",
    "zero-3": "ZeRO-3",
    "fsdp resumed": "FSDP2 resumed",
    "zero-2 resumed": "ZeRO-2 resumed",
    "accelerate ddp": "Accelerate DDP",
    "accelerate fsdp": "Accelerate FSDP2",
    "accelerate deepspeed": "Accelerate ZeRO-2",
    "trainer": "Trainer DDP",
    "trainer --deepspeed": "Trainer ZeRO-2",
}
TORCH, DEEPSPEED = (
    ("2.15.0", "2.14.1", "2.13.0", "2.12.1", "2.11.0", "2.10.0", "2.9.1"),
    ("0.19.0", "0.18.3", "0.18.0", "0.17.6", "0.16.0"),
)
REFERENCE = {
    "python": "3.11",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "accelerate": "1.15.0",
    "transformers": "5.23.0",
}
PYTHON = ("3.14", "3.13", "3.12")
ROWS = {
    **{f"Python {version}": {"python": version} for version in PYTHON},
    "Python 3.10": {"python": "3.10", "transformers": "5.20.2"},  # the last one for it
    **{f"torch {version}": {"torch": version} for version in TORCH},
    **{f"DeepSpeed {version}": {"deepspeed": version} for version in DEEPSPEED},
    "Accelerate 1.10.1": {"accelerate": "1.10.1"},
    **{f"transformers {version}": {"transformers": version} for version in ("4.57.6", "4.51.3")},
}
# A row of a Python runs these, one of each kind
SHORT = ("kernels", "plain", "ddp", "fsdp", "zero-2", "fsdp resumed", "accelerate fsdp", "trainer")
STEPS, SAVED_AT = 12, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where environments are made, one after the other")
    parser.add_argument("--row", action="append", choices=ROWS, help="only these")
    parser.add_argument("--case", action="append", choices=CASES, help="only these")
    parser.add_argument(
        "--inside", action="store_true", help="run the cases of the row in this environment and print JSON"
    )
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(inside(given.row[0], given.case)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", given.folder, ROOT],
        check=True,
    )
    wheel = max(given.folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    for row in given.row or ROWS:
        cases = given.case or (SHORT if "python" in ROWS[row] else CASES)
        write(row, run(row, given.folder / "environment", wheel, list(cases)))


def run(row: str, folder: Path, wheel: Path, cases: list[str]) -> dict[str, str]:
    """Case -> its figure, or the reason why there is none."""
    pins = REFERENCE | ROWS[row]
    subprocess.run([find_python(pins.pop("python")), "-m", "venv", "--clear", folder], check=True)
    python, pip = folder / "bin" / "python", [folder / "bin" / "pip", "-qq", "install"]
    others = [f"{name}=={version}" for name, version in pins.items() if name != "torch"]
    try:
        for wanted in (
            [f"torch=={pins['torch']}", "numpy", "setuptools", "wheel", "pyyaml", "pytest", "hypothesis", "psutil"],
            ["--no-build-isolation", *others],
            ["--no-deps", wheel],
        ):
            subprocess.run([*pip, *wanted], check=True)
        asked = [python, "-m", "tests.support.matrix", "--inside", "--row", row]
        asked += [word for case in cases for word in ("--case", case)]
        (folder / "tests").symlink_to(ROOT / "tests")  # beside the wheel, without the checkout's package
        temporary = folder / "tmp"  # killed ranks leave things in it
        temporary.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TMPDIR": str(temporary)}
        environment.pop("PYTHONPATH", None)  # the wheel is to run, not a checkout
        done = subprocess.run(asked, capture_output=True, text=True, cwd=folder, env=environment)
        if done.returncode:
            return dict.fromkeys(cases, done.stderr.strip().splitlines()[-1])
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)


def find_python(wanted: str) -> str:
    """The interpreter of that version, as "3.12": the one that runs this, or one of PATH."""
    if wanted == python_version():
        return sys.executable
    for folder in os.get_exec_path():
        found = shutil.which(f"python{wanted}", path=folder)
        # a version manager has a launcher for each version there, and those that are not chosen only say so
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    raise SystemExit(f"PATH: expected python{wanted}, got none that runs; install it, or put its folder on PATH")


def python_version() -> str:
    return "{}.{}".format(*sys.version_info)


def inside(row: str, cases: list[str]) -> dict[str, str]:
    """Four ranks, as the tests have them; the largest distance of any state from what it should be after ``STEPS``
    steps."""
    for name, pin in (REFERENCE | ROWS[row]).items():
        installed = python_version() if name == "python" else version(name).partition("+")[0]
        assert installed == pin, f"{name}: expected {pin}, got {installed}; another package of this row wants that one"
    import deslo_plugin
    from deslo_plugin.kernels.update import native
    from tests.support.worlds import Processes

    assert Path(deslo_plugin.__file__).is_relative_to(sys.prefix), deslo_plugin.__file__
    found = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            world = None
            try:
                if case == "kernels":
                    found[case] = {"python": "none"}.get(native(), native())
                elif case.startswith("trainer"):
                    found[case] = f"loss {trained(case.split()[1:]):.2f}"
                else:
                    world = Processes(4, Path(folder))
                    apart = resumed(world, case, folder) if "resumed" in case else distance(world, case)
                    found[case] = f"{apart:.0e}" if apart else "0"
            except Exception as error:
                print(f"{case}: {error}", file=sys.stderr)
                lines = str(error).strip().splitlines()
                # torchrun adds a frame of its own
                named = [line for line in lines if re.search(r"(?<!ChildFailed)(Error|Exception): ", line)]
                found[case] = (named or lines)[-1][:160]
            finally:
                if world is not None:
                    world.close()
    return found


def trained(options: list[str]) -> float:
    """The loss of the model that the Hugging Face Trainer's example averages out of its replicas; 4.2 at the start."""
    from tests.support.trainer_example import TORCHRUN, run_example

    return run_example(TORCHRUN, options)["loss"]


def resumed(world, case: str, folder: str) -> float:
    """How far a job that is built anew and loads an exact save is from the one that went on."""
    from tests.support import checkpoint_jobs

    kind = case.removesuffix(" resumed")
    results = world.run(
        checkpoint_jobs.resumed,
        kind.replace("-", " "),
        config_of(kind),
        f"{folder}/saved",
        "per_replica",
        SAVED_AT,
        STEPS - SAVED_AT,
        timeout=600,
    )
    return max(
        float((result["loaded"][state][name] - expected).abs().max())
        for result in results
        for state, tensors in result["straight"].items()
        for name, expected in tensors.items()
    )


def config_of(case: str) -> dict:
    from tests.support.oracle import blocks
    from tests.support.theory import ACCUMULATION, CLIP, RULES

    s = RULES["des-loc-adam"]
    if case.startswith("zero"):
        return blocks(s, replica_size=2) | {
            "zero_optimization": {"stage": int(case[-1])},
            "gradient_clipping": CLIP,
            "gradient_accumulation_steps": ACCUMULATION,
        }
    return blocks(s, replica_size={"fsdp": "auto", "hsdp": "auto", "plain": "auto"}.get(case, 2))


def distance(world, case: str) -> float:
    """The largest distance of any state on any rank from the float64 oracle."""
    from tests.support import jobs, torch_jobs
    from tests.support.theory import RULES, oracle_states

    s, config = RULES["des-loc-adam"], config_of(case)
    if case.startswith("zero"):
        results = world.run(jobs.run, config, STEPS, timeout=600)
    elif case.startswith("accelerate"):
        from tests.support import accelerate_jobs

        kind = case.split()[1]
        ds = config_of("zero-2") | {"train_micro_batch_size_per_gpu": jobs.MICRO_BATCH} if kind == "deepspeed" else None
        given = ("DummyOptim", None) if ds else ("DesLoc", config)
        results = world.run(accelerate_jobs.run, kind, "before", *given, STEPS, ds, timeout=600)
    else:
        results = world.run(torch_jobs.run, case, config, STEPS, timeout=600)
    theory = oracle_states(s, STEPS, replicas=4 if case == "plain" else 2)
    return max(
        float((result["states"][state][name].double() - expected).abs().max())
        for rank, result in enumerate(results)
        for state, tensors in theory[rank * len(theory) // len(results)].items()
        if state in result["states"]
        for name, expected in tensors.items()
    )


def write(row: str, found: dict[str, str]) -> None:
    """Puts what was found into the table of docs/versions.md; what was not run now stays as it was."""
    head, table, tail = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", PAGE.read_text())
    names, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    known = {line[0]: dict(zip(names[1:], line[1:])) for line in lines}
    known.setdefault(row, {}).update({CASES[case]: cell.replace("|", "/") for case, cell in found.items()})
    rows = [["versions", *CASES.values()], ["---"] * (1 + len(CASES))]
    rows += [[name, *(known.get(name, {}).get(case, "not run") for case in CASES.values())] for name in ROWS]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    PAGE.write_text(head + BEGIN + text + END + tail)
    print(row, known[row], flush=True)


if __name__ == "__main__":
    main()
