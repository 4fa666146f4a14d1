"""``deslo``: what its commands print, in which status they end, and one real launch of those that need one."""

import json
from pathlib import Path

import pytest
import torch

import deslo_plugin
from deslo_plugin import cli
from tests.support.command_line import DES_LOC, ROOT, answer, run
from tests.support.launching import Launch


def test_probe_wants_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun" in run("probe", status=2).stderr


@pytest.mark.parametrize("deslo", [{}, {"fragments": "auto"}, {"sync_delay": 2}], ids=str)
def test_doctor_alone_steps_the_config_and_says_what_it_could_not_see(tmp_path, monkeypatch, deslo):
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"deslo": {"replica_size": 8} | deslo}))
    found = answer("doctor", "--config", str(path))
    checks = {each["name"]: each for each in found["checks"]}
    assert found["ok"] and checks["torch"]["found"] == torch.__version__
    assert checks["steps"]["status"] == "ok" and "2 with torch" in checks["steps"]["found"]
    assert checks["bytes"]["status"] == "warning" and "torchrun" in checks["bytes"]["do"]
    assert "GB/s" in checks["kernels"]["found"]


@pytest.mark.parametrize(
    "check, blocks, words",
    [
        ("config", {"deslo": {"replica_size": 1, "overlapp": True}}, "did you mean 'overlap_comm'?"),
        ("config", {"model": "gpt"}, "neither in"),
        ("steps", {"deslo": {"sync_every": {"params": 3, "heat": 6}}}, "expected states of torch's AdamW or SGD"),
    ],
)
def test_doctor_ends_in_1_with_what_a_script_would_have_been_told(tmp_path, monkeypatch, check, blocks, words):
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "two.json"
    path.write_text(json.dumps(blocks))
    found = answer("doctor", "--config", str(path), status=1)
    wrong = [each for each in found["checks"] if each["status"] == "wrong"]
    assert not found["ok"] and [each["name"] for each in wrong] == [check] and words in wrong[0]["found"]


def launch(size: int, folder: Path, *arguments: str) -> Launch:
    return Launch(["-m", "deslo_plugin.cli", *arguments], size, folder, cwd=ROOT, DS_ACCELERATOR="cpu")


def test_a_launched_doctor_counts_what_it_planned_with_deepspeed(tmp_path):
    doctor = launch(4, tmp_path, "doctor", "--config", DES_LOC, "--json")
    assert doctor.wait() == [0] * 4, doctor.said("err")[-3000:]
    checks = {each["name"]: each for each in json.loads(doctor.said("out"))["checks"]}
    assert checks["replicas"]["found"].startswith("2 replica(s) of 2 rank(s) on 1 node(s), gloo")
    assert "2 with DeepSpeed" in checks["steps"]["found"]
    assert checks["bytes"] == {
        "name": "bytes",
        "status": "ok",
        "do": "",
        "found": "counted as planned: params 16,644, exp_avg 16,640, exp_avg_sq 16,640",
    }
    assert "Gbit/s" in checks["link"]["found"]


def test_a_launched_doctor_ends_in_1_if_the_config_does_not_fit_the_world(tmp_path):
    doctor = launch(3, tmp_path, "doctor", "--config", DES_LOC)
    assert doctor.wait() == [1] * 3
    assert "a divisor of the world size 3" in " ".join(doctor.said("out").replace("│", "").split())


def test_a_link_that_was_probed_is_one_to_plan_with(tmp_path):
    probe = launch(2, tmp_path, "probe", "--replica-size", "1", "--mb", "4", "--rounds", "5", "--json")
    assert probe.wait() == [0, 0], probe.said("err")[-3000:]
    measured = json.loads(probe.said("out"))
    low, high = measured["quartiles"]["gbit_per_s"]
    assert 0 < low <= measured["gbit_per_s"] <= high and measured["latency_ms"] > 0
    assert measured["replicas"] == 2 and "loopback" in measured["warnings"][0]
    path = tmp_path / "link.json"
    path.write_text(probe.said("out"))
    plan = answer("plan", "--config", DES_LOC, "--params", "1B", "--link", str(path), "--step-ms", "100")
    assert plan["link"] == {"gbit_per_s": measured["gbit_per_s"], "latency_ms": pytest.approx(measured["latency_ms"])}


@pytest.fixture
def checkpoint(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = deslo_plugin.DesLoc(model.parameters(), lr=0.01, state_dtype="bfloat16")
    deslo_plugin.attach(model, optimizer)
    for _ in range(3):
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    deslo_plugin.save(tmp_path / "run" / "step_3", model)
    return tmp_path / "run" / "step_3"


@pytest.mark.parametrize("of", ["checkpoint", "folder"])
def test_inspect_says_what_a_checkpoint_holds(checkpoint, of):
    found = answer("ckpt", "inspect", str(checkpoint if of == "checkpoint" else checkpoint.parent))
    assert found["whole"] and found["path"] == str(checkpoint)
    assert (found["mode"], found["steps"], found["replicas"], found["replica_size"]) == ("averaged", 3, 1, 1)
    assert found["parameters"] == 4 * 3 + 3 + 3 + 3 and found["param_groups"] == [{"lr": 0.01}]
    assert list(found["states"]) == ["params", *sorted(set(found["states"]) - {"params"})]
    assert found["states"]["params"] == {"tensors": 4, "elements": 21, "bytes": 84, "dtypes": ["float32"]}
    assert found["states"]["exp_avg_sq"] == {"tensors": 4, "elements": 21, "bytes": 42, "dtypes": ["bfloat16"]}
    assert "whole: 4 files" in run("ckpt", "inspect", str(checkpoint)).stdout


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_inspect_names_a_torn_file_and_ends_in_1(checkpoint, name):
    torn = checkpoint / name
    torn.write_bytes(torn.read_bytes()[:-1])
    assert answer("ckpt", "inspect", str(checkpoint), status=1)["damaged"] == {name: "other bytes than were saved"}
    torn.unlink()
    assert f"TORN: {name}: missing" in run("ckpt", "inspect", str(checkpoint), status=1).stdout


def test_inspect_knows_a_save_that_was_cut_off(checkpoint):
    part = checkpoint.rename(checkpoint.with_name("step_3.part"))
    (part / "deslo.json").unlink()
    assert "a save that was cut off" in run("ckpt", "inspect", str(part), status=2).stderr


def test_without_typer_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(SystemExit, match=r"pip install 'deslo-plugin\[cli\]'"):
        cli.main()


def test_version():
    assert run("--version").stdout.strip() == deslo_plugin.__version__
