"""Telemetry beside other people's files, in reports, and in a job that is told to go."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import deslo_plugin
from deslo_plugin.cli.app import app
from deslo_plugin.telemetry.jsonl_writer import JsonlWriter
from deslo_plugin.telemetry.report import charts
from deslo_plugin.telemetry.report.run import Run
from tests.support.telemetry_lines import average, end, log, start, write


def attached(folder: Path):
    import torch

    model = torch.nn.Linear(2, 1)
    config = {"optimizer": {"params": {"sync_every": {"params": 2}}}, "deslo": {"telemetry": {"path": str(folder)}}}
    return deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), config))


def link(path: Path, victim: Path) -> str:
    path.symlink_to(victim)
    return "is a link"


def foreign(path: Path, victim: Path) -> str:
    shutil.copy(victim, path)
    return "is no telemetry of deslo_plugin"


def pipe(path: Path, victim: Path) -> str:
    os.mkfifo(path)
    return "is no telemetry of deslo_plugin"


@pytest.mark.parametrize("lies_there", [link, foreign, pipe])
@pytest.mark.parametrize("text", ["a line\nand one without an end", "no line at all", '{"loss": 1}\n{"loss'])
def test_what_is_not_ours_is_neither_followed_nor_cut(tmp_path, lies_there, text):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text(text)
    folder.mkdir()
    said = lies_there(folder / "replica-0.jsonl", victim)
    with pytest.raises(deslo_plugin.ConfigError, match=f"deslo.telemetry.path: expected a folder .*{said}"):
        attached(folder)
    assert victim.read_text() == text
    if lies_there is foreign:
        assert (folder / "replica-0.jsonl").read_text() == text


@pytest.mark.parametrize("left", ["", '{"kind":"st', '{"kind":"start","at":1', '{"kind":"start","at":1}\n{"kin'])
def test_a_run_goes_on_in_a_file_that_it_was_cut_off_in(tmp_path, left):
    path = tmp_path / "replica-0.jsonl"
    path.write_text(left)
    journal = JsonlWriter(path)
    journal.write({"kind": "start", "at": 2})
    journal.close()
    assert [json.loads(line)["at"] for line in path.read_text().splitlines()] == ([1, 2] if "\n" in left else [2])


def test_names_of_runs_are_text_wherever_they_stand(tmp_path):
    names = ["dollar$\\frac{$", "<img src=x onerror=alert(1)>|`*[x](y)", "_under"]
    for name in names:
        write(
            tmp_path / name,
            0,
            start(0, replicas=1),
            *(log(step, 100.0 + step, 1.0) for step in range(1, 5)),
            average(4, 104.0, 0.1, params=10),
            end(105.0, 4),
        )
    page, picture, text = (tmp_path / name for name in ("a.html", "a.png", "a.md"))
    told = CliRunner().invoke(
        app,
        [
            "report",
            *(str(tmp_path / name) for name in names),
            "--out",
            str(page),
            "--png",
            str(picture),
            "--markdown",
            str(text),
        ],
    )
    assert told.exit_code == 0, told.output
    assert "<img" not in page.read_text() and "<img" not in text.read_text() and picture.stat().st_size
    head = text.read_text().splitlines()[0]
    assert r"dollar\$\\frac{\$" in head and r"&lt;img src=x onerror=alert(1)&gt;\|\`\*\[x\](y)" in head
    assert "dollar$\\frac{$" in page.read_text()


@pytest.mark.parametrize(
    "records, said",
    [
        ([start(0, replicas="two")], "line 1: replicas 'two'"),
        ([start(0, groups=[{"periods": [2]}])], "line 1: groups"),
        ([start(0), log("3", 101.0, 1.0)], "line 2: steps '3'"),
        ([start(0), log(3, 101.0, "low")], "line 2: loss 'low'"),
        ([start(0), log(1, 101.0, 1.0), average(2, 102.0, 0.1, params="many")], "line 3: bytes {'params': 'many'}"),
        ([start(0), {"kind": ["end"]}], r"line 2: kind \['end'\]"),
        ([log(1, 101.0, 1.0)], "line 1: no start"),
    ],
)
def test_a_line_that_telemetry_does_not_write_is_named(tmp_path, records, said):
    path = write(tmp_path / "run", 0, *records)
    told = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "a.html")])
    assert told.exit_code == 2 and isinstance(told.exception, SystemExit)
    import re

    assert re.search(f"deslo report {path}: expected lines of deslo.telemetry, got {said}", told.stderr)


def test_legends_hide_nothing_and_no_state_is_red(tmp_path):
    from matplotlib.figure import Figure

    states = ["params", "exp_avg", "exp_avg_2", "exp_avg_3", "exp_avg_sq", "buffers"]
    records = [average(steps, 100.0 + steps, 0.1, **dict.fromkeys(states, 10)) for steps in range(2, 9, 2)]
    write(
        tmp_path / "run",
        0,
        start(0, replicas=1),
        *(log(step, 100.0 + step, 9.0 - step, tokens=10**9) for step in range(1, 9)),
        *records,
    )
    for chart in charts._charts([Run(tmp_path / "run")]):
        figure = Figure(figsize=(charts.WIDTH, chart.height), layout="constrained")
        chart.on(figure)
        figure.draw_without_rendering()
        for axes in figure.axes:
            if axes.get_legend():
                assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent().padded(-2)), (
                    chart.title
                )
            assert not axes.xaxis.get_offset_text().get_text()  # a power of ten would lie over the label
            drawn = {tuple(bar.get_facecolor()[:3]) for bar in axes.patches} - {(1.0, 0.0, 0.0)}
            assert all(max(abs(a - b) for a, b in zip(color, (0.84, 0.15, 0.16))) > 0.2 for color in drawn), chart.title


LEAVES = """
import os, sys, types, torch
written = open(sys.argv[1] + "/events", "w")

class SummaryWriter:
    def __init__(self, folder): self.rows = []
    def add_scalar(self, name, value, steps): self.rows.append(name)
    def close(self): written.write("\\n".join(self.rows)); written.flush()

sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
import deslo_plugin, deslo_plugin.frameworks.telemetry_sinks as wiring
wiring.find_spec = lambda name: name
model = torch.nn.Linear(2, 1)
optimizer = deslo_plugin.DesLoc(model.parameters(), {"optimizer": {"params": {"sync_every": {"params": 2}}},
    "deslo": {"telemetry": {"path": sys.argv[1] + "/run", "tensorboard": True}}})
deslo_plugin.attach(model, optimizer)
preemption = deslo_plugin.Preemption(model)
for _ in range(3):
    model(torch.ones(2)).sum().backward(); optimizer.step()

def before():
    print("told", os.path.exists(sys.argv[1] + "/c/deslo.json"))
    if sys.argv[2] == "raises": raise RuntimeError("tracker is gone")

preemption.save_and_exit(sys.argv[1] + "/c", extra={"step": 3}, before=before)
"""


@pytest.mark.parametrize("callback", ["returns", "raises"])
def test_a_preempted_job_closes_its_writers_and_tells_trackers_before_it_leaves(tmp_path, callback):
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, str(tmp_path), callback],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": str(Path(deslo_plugin.__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "told True\n" and "deslo_bytes/params" in (tmp_path / "events").read_text()
    assert (
        "Preemption.save_and_exit(before=...) failed, the checkpoint is whole: RuntimeError('tracker is gone')"
        in done.stderr
    ) == (callback == "raises")
