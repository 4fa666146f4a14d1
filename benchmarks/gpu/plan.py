"""Everything that one GPU can say of this package, in order of worth, within a time limit.

    python benchmarks/gpu/plan.py [--limit 1500] [--pack build/gpu-pack] [--only smoke kernels] [--again]
    python benchmarks/gpu/plan.py --device cpu       the dry run: what can run without a GPU, with tiny sizes

Each part is a process of its own with a time limit; one that fails, dies or hangs stops no other. Results are written
after each part: FOLDER/summary.json has statuses and figures, FOLDER/raw.txt the last 64 KB of what each part printed.
A part that has passed for the same code is not run again. --pack takes what `make gpu-pack` has built: the CUDA module
and wheels, for a machine without network. Exits 1 if a part failed.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__:
    from benchmarks.gpu.parts import ROOT, Part, parts_for
else:  # started by its path, where nothing is installed
    from parts import ROOT, Part, parts_for

KEPT = 64 << 10  # bytes of each part's output
LEAST_S = 5  # a part is not begun with less
CODE = (
    "deslo_plugin",
    "csrc",
    "benchmarks/checkpoint",
    "benchmarks/gpu",
    "benchmarks/quality/recipe",
    "benchmarks/simulation",
    "tests",
    "examples",
)


def main(given: Sequence[str] | None = None, parts: list[Part] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=1500, help="seconds for all parts (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these parts")
    parser.add_argument("--again", action="store_true", help="also what has passed for this code")
    parser.add_argument("--folder", type=Path, help="of the results, by default benchmarks/results/gpu/DEVICE")
    parser.add_argument("--pack", type=Path, help="what make gpu-pack has built")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    options = parser.parse_args(given)
    chosen = parts if parts is not None else parts_for(options.device)
    if unknown := sorted(set(options.only or ()) - {part.name for part in chosen}):
        parser.error(f"--only: expected some of {', '.join(part.name for part in chosen)}, got {', '.join(unknown)}")
    if options.list:
        print("\n".join(f"{part.name:14s} {part.limit:4.0f} s  {shown(part.command)}" for part in chosen))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the part that runs, too
    with tempfile.TemporaryDirectory() as scratch:
        if options.pack:
            unpack(options.pack, Path(scratch) / "site")
        plan = Plan(options.device, options.folder, Path(scratch), options.limit)
        for part in chosen:
            if not options.only or part.name in options.only:
                plan.take(part, options.again)
    print(plan.table())
    return plan.failed


def unpack(pack: Path, site: Path) -> None:
    """Installs the wheels of ``pack`` into ``site`` and its module into this checkout."""
    wheels = sorted(map(str, pack.glob("*.whl")))
    if not wheels:
        sys.exit(f"--pack: expected wheels in {pack}, found none; make gpu-pack builds them")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--no-compile", "--target", site, *wheels], check=True)
    for module in pack.glob("_C*.so"):
        shutil.copy(module, ROOT / "deslo_plugin" / module.name)


class Plan:
    """Runs parts and keeps what they say in ``folder``."""

    def __init__(self, device: str, folder: Path | None, scratch: Path, limit: float):
        self.device, self.scratch, self.limit, self.start = device, scratch, limit, time.monotonic()
        self.site = scratch / "site"  # what unpack has installed
        about = described(device)
        self.folder = folder or ROOT / "benchmarks" / "results" / "gpu" / re.sub(r"\W+", "-", about["device"]).lower()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names: list[str] = []  # of this run
        self.parts, self.raw = self._found(about["code"])
        self.about = about

    def _found(self, code: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What an earlier run has left, its statuses and its output."""
        summary, raw = self.folder / "summary.json", self.folder / "raw.txt"
        try:
            parts = json.loads(summary.read_text())["parts"]
            sections = re.split(r"^=== (\S+) ===\n", raw.read_text(), flags=re.M)[1:]
        except (FileNotFoundError, ValueError, KeyError):
            return {}, {}
        return parts, dict(zip(sections[::2], sections[1::2]))

    def take(self, part: Part, again: bool) -> None:
        """Runs ``part``, unless it has passed or cannot run here, and writes down what came of it."""
        self.names.append(part.name)
        before = self.parts.get(part.name, {})
        if not again and before.get("status") == "passed" and before.get("code") == self.about["code"]:
            return self.say(f"{part.name}: passed before")
        left = self.limit - (time.monotonic() - self.start)
        reason = part.lacks(self.device, self.site) or ("" if left >= LEAST_S else f"{self.limit:g} s are over")
        if reason:
            if before.get("status") != "passed":
                self.parts[part.name] = {"status": "skipped", "reason": reason}
            self.say(f"{part.name}: skipped, {reason}")
        else:
            limit = min(part.limit, left)
            self.say(f"{part.name}: at most {limit:.0f} s")
            self.run(part, limit)
            self.say(f"{part.name}: {self.parts[part.name]['status']} in {self.parts[part.name]['seconds']:.1f} s")
        self.write()

    def run(self, part: Part, limit: float) -> None:
        out, said = self.scratch / f"{part.name}.json", self.scratch / f"{part.name}.txt"
        command = [word.replace("{out}", str(out)) for word in part.command]
        begin = time.monotonic()
        with said.open("wb") as output:
            try:
                code = bounded(command, self.environment() | part.env, output, limit)
            except OSError as error:
                output.write(str(error).encode())
                code = 127
        seconds = time.monotonic() - begin
        status = {0: "passed", None: "timeout"}.get(code, "failed")
        row = {"status": status, "seconds": round(seconds, 1), "command": shown(part.command)}
        row |= {"code": self.about["code"], "exit status": code}
        if out.exists():
            row["figures"] = json.loads(out.read_text())
        self.parts[part.name] = row
        with said.open("rb") as output:
            output.seek(max(0, said.stat().st_size - KEPT))
            text = output.read().decode(errors="replace")
        self.raw[part.name] = re.sub(r"^===", " ===", text, flags=re.M)
        if status != "passed":
            print("\n".join(f"    {line}" for line in text.strip().splitlines()[-12:]), flush=True)

    def environment(self) -> dict[str, str]:
        """Of the parts: the checkout and the pack are importable."""
        paths = [ROOT, self.site, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
        env |= {"DESLO_TEST_DEVICE": self.device, "DS_ACCELERATOR": self.device, "DS_BUILD_OPS": "0"}
        env |= {"TMPDIR": str(self.scratch)}
        return {"OMP_NUM_THREADS": "1", **os.environ, **env}

    def write(self) -> None:
        text = json.dumps(self.about | {"parts": self.parts}, indent=1)
        (self.folder / "summary.json").write_text(text + "\n")
        sections = (f"=== {name} ===\n{text.rstrip()}\n\n" for name, text in self.raw.items())
        (self.folder / "raw.txt").write_text("".join(sections))

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {what}", flush=True)

    def table(self) -> str:
        rows = [(name, self.parts.get(name, {})) for name in self.names]
        lines = [f"{'part':16s} {'status':8s} {'seconds':>8s}"]
        for name, row in rows:
            seconds = f"{row['seconds']:8.1f}" if "seconds" in row else " " * 8
            lines.append(f"{name:16s} {row.get('status', ''):8s} {seconds}  {row.get('reason', '')}".rstrip())
        return "\n".join([*lines, f"{self.about['device']}: see {self.folder}"])

    @property
    def failed(self) -> int:
        return int(any(self.parts.get(name, {}).get("status") in ("failed", "timeout") for name in self.names))


def shown(command: Sequence[str]) -> str:
    """For a reader who wants to run it himself."""
    return shlex.join("python3" if word == sys.executable else word for word in command)


def bounded(command: Sequence[str], env: dict[str, str], output: Any, limit: float) -> int | None:
    """The exit status of ``command``, or None if it was killed after ``limit`` seconds; none of its processes is
    left."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # torchrun gives its ranks sessions of their own
        offspring = descendants(process.pid) if process.poll() is None else []
        for pid, end in [(process.pid, os.killpg), *((pid, os.kill) for pid in offspring)]:
            try:
                end(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        process.wait()


def descendants(pid: int) -> list[int]:
    """The children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, open_ = [], [pid]
    while open_:
        open_ += (new := children.get(open_.pop(), []))
        found += new
    return found


ASK = """
import json, sys, torch
there = torch.cuda.is_available()
name = torch.cuda.get_device_name() if there else None
print(json.dumps({"device": name, "torch": torch.__version__, "python": sys.version.split()[0]}))
"""


def described(device: str) -> dict[str, Any]:
    """What the results are of: the card, torch, the driver, and the code. This process takes no memory of the card."""
    answer = first_line([sys.executable, "-c", ASK])
    about = json.loads(answer) if answer else {"device": None, "torch": None}
    if device == "cpu":
        about["device"] = "cpu"
    elif not about["device"]:
        sys.exit("--device cuda: expected a GPU that torch can use, found none; --device cpu is the dry run")
    about["driver"] = first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    about["commit"] = first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    return about | {"code": digest()}


def first_line(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


def digest() -> str:
    """Of the files that results depend on, the built module among them."""
    total = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp", ".so", ".json"):
                total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
