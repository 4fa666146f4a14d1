"""``make gpu`` before there is a GPU: its dry run, what is left of a part that hangs or dies, and what is not run
again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import plan
from tests.support.device import cpu_only

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
PLENTY_S = 1800  # against hangs

pytestmark = cpu_only("the plan runs this suite there, not the other way round")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())["parts"]


def test_the_dry_run_passes_and_says_what_needs_a_gpu(tmp_path):
    command = [sys.executable, FOLDER / "plan.py", "--device", "cpu", "--folder", tmp_path, "--limit", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PLENTY_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = summary(tmp_path)
    assert {row["status"] for row in parts.values()} == {"passed", "skipped"}
    ran = {name for name, row in parts.items() if row["status"] == "passed"}
    assert {"smoke", "kernels", "tests-kernels", "bandwidth", "recipe", "overlap-plain", "frameworks"} <= ran
    assert parts["sanitizer"]["reason"] == "needs a GPU"
    measured = [row["what"] for row in parts["bandwidth"]["figures"]["rows"]]
    assert "adam N=3, 0.125M, x float32, states float32" in measured
    assert [row["link ms"] for row in parts["overlap-plain"]["figures"]["rows"]] == [0, 2, 20]
    assert "=== smoke ===\ndeslo_plugin" in (tmp_path / "raw.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.txt", "summary.json"]


def test_parts_that_hang_or_die_stop_no_other_and_leave_no_process(tmp_path, capfd):
    spawned = tmp_path / "child"
    hang = (  # with a child in a session of its own, as torchrun has
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(999)'], start_new_session=True)\n"
        f"open({str(spawned)!r}, 'w').write(str(child.pid)); print('hanging', flush=True); time.sleep(999)"
    )
    parts = [
        plan.Part("hangs", python(hang), 5),
        plan.Part("dies", python("import os; os.abort()"), 60),
        plan.Part("is not there", ["/no/such/program"], 60),
        plan.Part("lacks", python(""), 60, ["no_such_module"]),
        plan.Part("works", python("print('x' * 100_000)"), 60),
    ]
    folder = tmp_path / "results"
    assert plan.main(["--device", "cpu", "--folder", str(folder)], parts) == 1
    found = summary(folder)
    assert {name: row["status"] for name, row in found.items()} == {
        "hangs": "timeout",
        "dies": "failed",
        "is not there": "failed",
        "lacks": "skipped",
        "works": "passed",
    }
    assert found["lacks"]["reason"] == "no_such_module not found"
    raw = (folder / "raw.txt").read_text()
    assert "=== hangs ===\nhanging" in raw and plan.KEPT <= len(raw) < plan.KEPT + 1000
    assert "works            passed" in capfd.readouterr().out
    child = int(spawned.read_text())
    deadline = time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < deadline, "a child of a part that was killed still runs"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_has_passed_for_this_code_is_not_run_again(tmp_path, monkeypatch):
    counted = tmp_path / "runs"
    count = lambda word: python(f"open({str(counted)!r}, 'a').write({word!r})")
    good, bad = plan.Part("good", count("g"), 60), plan.Part("bad", [*count("b")[:2], count("b")[2] + "; 1/0"], 60)
    run = lambda *more: plan.main(["--device", "cpu", "--folder", str(tmp_path / "results"), *more], [good, bad])
    assert run() == 1 and counted.read_text() == "gb"
    assert run() == 1 and counted.read_text() == "gbb"
    assert run("--only", "good") == 0 and counted.read_text() == "gbb"
    assert run("--only", "good", "--again") == 0 and counted.read_text() == "gbbg"
    monkeypatch.setattr(plan, "digest", lambda: "other code")
    assert run("--only", "good") == 0 and counted.read_text() == "gbbgg"
    assert [*summary(tmp_path / "results")] == ["good", "bad"]


def test_time_that_is_over_skips_the_rest(tmp_path):
    parts = [plan.Part("long", python("import time; time.sleep(999)"), 900), plan.Part("late", python(""), 60)]
    assert plan.main(["--device", "cpu", "--folder", str(tmp_path), "--limit", "9"], parts) == 1
    assert {name: row["status"] for name, row in summary(tmp_path).items()} == {"long": "timeout", "late": "skipped"}


def test_an_unknown_part_is_refused_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plan.main(["--device", "cpu", "--folder", str(tmp_path), "--only", "smoek"])
    assert "expected some of smoke, kernels, " in capsys.readouterr().err
    assert not os.listdir(tmp_path)
