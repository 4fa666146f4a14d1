"""``deslo``: what its commands print, in which status they end, and one real launch of those that need one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import deslo_plugin
from deslo_plugin import cli
from deslo_plugin.cli.app import app
from deslo_plugin.cli.model_size import parse_count

ROOT = Path(__file__).resolve().parents[2]
DES_LOC = str(ROOT / "configs" / "des-loc-adam.json")  # 2 ranks per replica, 32 / 96 / 192
PLAN = ["plan", "--config", DES_LOC, "--replicas", "4", "--gbps", "10", "--latency-ms", "1"]
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}


def run(*arguments: str, status: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def answer(*arguments: str, status: int = 0) -> dict:
    return json.loads(run(*arguments, "--json", status=status).stdout)


def test_plan_prints_hand_computed_figures():
    plan = answer(*PLAN, "--params", "1B", "--step-ms", "1000", "--steps", "193")
    own, in_turn, synchronous, *_ = plan["methods"]
    assert plan["parameters"] == 10**9 and plan["replica_size"] == 2
    # and a word with what is due; 193 steps: params after 32, 64, ..., 192, exp_avg after 96 and 192, exp_avg_sq after
    # 192; 2 GB from each of 2 ranks
    assert own["bytes_per_rank_by_state"] == {"params": 12e9 + 6 * 4, "exp_avg": 4e9, "exp_avg_sq": 2e9}
    assert synchronous["bytes_per_rank"] == 193 * 2 * 10**9
    vector = 2 * 4e9 * 8 / 1e10 * (1 - 1 / 4) + 0.001 * 30  # 2 GB are 30 buckets of 64 MiB
    waited = 4 * (vector - 1) + (2 * vector - 1) + (3 * vector - 1)
    assert own["exposed_ms_per_step"] == pytest.approx(1e3 * waited / 193)
    assert in_turn["exposed_ms_per_step"] == pytest.approx(1e3 * 9 * vector / 193)
    assert own["longest_wait_s"] == pytest.approx(3 * vector - 1)
    assert own["hours"] == pytest.approx((193 + waited) / 3600)
    assert synchronous["hours"] == pytest.approx(193 * (1 + vector) / 3600)
    assert own["times_faster_than_synchronous"] == pytest.approx(synchronous["hours"] / own["hours"])
    assert plan["memory_bytes_per_rank"] == {"states": 4 * 10**9, "in_flight": 6 * 10**9}
    assert plan["pinned_host_bytes_per_rank"] == 0
    assert plan["sweep"][-1]["gbit_per_s"] == 1000 and plan["sweep"][0]["hours"]["synchronous"] > synchronous["hours"]


def test_plan_says_what_averages_pin_of_the_hosts_memory(tmp_path):
    file = json.loads(Path(DES_LOC).read_text())
    file["deslo"]["transport"] = "host"
    (tmp_path / "host.json").write_text(json.dumps(file))
    given = ["plan", "--config", str(tmp_path / "host.json"), *PLAN[3:], "--params", "1B", "--step-ms", "1000"]
    assert answer(*given)["pinned_host_bytes_per_rank"] == 6 * 10**9  # three states, half of each on a rank
    assert "through host memory pin up to 6 GB" in " ".join(run(*given).stdout.split())


def test_plan_works_the_time_of_a_step_out_of_tokens_and_mfu():
    plan = answer(*PLAN, "--params", "1e9", "--tokens-per-step", "2e6", "--peak-tflops", "1000", "--mfu", "0.5")
    assert plan["step_ms"] == pytest.approx(1e3 * 6 * 1e9 * 2e6 / (0.5 * 1000e12 * 8))
    assert any("6 d D / (MFU S)" in each for each in plan["assumptions"])


def test_plan_prints_periods_rules_and_every_assumption():
    text = run(*PLAN, "--params", "350M", "--step-ms", "200").stdout
    text = " ".join(text.split())
    for words in (
        "half-life rule",
        "13.5",
        "Local Adam",
        "params only (DiLoCo)",
        "Gbit/s",
        "2 b/B (1 - 1/M) + l, M = 4",
        "float32",
        "headers and protocol are not counted",
        "What this assumes:",
        '"sync_delay":',
    ):
        assert words in text, words


def test_plan_takes_the_dtype_of_gradients_from_a_deepspeed_config(tmp_path):
    config = json.loads(Path(DES_LOC).read_text()) | {"bf16": {"enabled": True}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    plan = answer("plan", "--config", str(path), "--params", "1M", "--gbps", "1", "--step-ms", "10", "--steps", "10")
    assert plan["gradient_dtype"] == "bfloat16" and plan["methods"][2]["bytes_per_rank"] == 10 * 2 * 500_000


def test_plan_counts_the_parameters_of_a_hugging_face_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2))
    layer = 8 * 24 + 24 + 8 * 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8 + 4 * 8
    plan = answer(*PLAN, "--model", str(path), "--step-ms", "1")
    assert plan["parameters"] == 100 * 8 + 16 * 8 + 2 * layer + 2 * 8  # the output layer is the embedding


def test_plan_counts_the_parameters_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "shop.py").write_text(
        "import torch\nbuild = lambda: torch.nn.Linear(10**6, 10**6)\nthing = lambda: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert answer(*PLAN, "--model", "shop:build", "--step-ms", "1")["parameters"] == 10**12 + 10**6
    assert "has no attribute 'absent'" in run(*PLAN, "--model", "shop:absent", "--step-ms", "1", status=2).stderr
    error = run(*PLAN, "--model", "shop:thing", "--step-ms", "1", status=2).stderr
    assert "expected a function that returns an nn.Module, got int" in error
    sys.modules.pop("shop")


@pytest.mark.parametrize(
    "text, count", [("124439808", 124439808), ("1.3B", 13 * 10**8), ("350m", 35 * 10**7), ("2K", 2000)]
)
def test_counts_have_units(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("order", [{"overlap_comm": False}, {"average_at": "after_step"}], ids=str)
def test_plan_of_a_config_without_overlap_has_no_second_row_for_it(tmp_path, order):
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"deslo": {"replica_size": 1, **order}}))
    plan = answer("plan", "--config", str(path), "--params", "1M", "--gbps", "1", "--step-ms", "10")
    assert "its overlap off" not in [row["method"] for row in plan["methods"]]


def test_plan_of_a_stock_optimizer_knows_its_states(tmp_path):
    path = tmp_path / "muon.json"
    path.write_text(json.dumps({"deslo": {"replica_size": 1, "sync_every": {"params": 10, "momentum_buffer": 30}}}))
    plan = answer("plan", "--config", str(path), "--params", "1000", "--gbps", "1", "--step-ms", "10", "--steps", "31")
    assert plan["methods"][0]["bytes_per_rank_by_state"] == {"params": 12012, "momentum_buffer": 4000}
    assert "all on one period" in [row["method"] for row in plan["methods"]]


def test_plot_draws_hours_over_bandwidth(tmp_path):
    run(*PLAN, "--params", "1B", "--step-ms", "1000", "--steps", "1000", "--plot", str(tmp_path / "sweep.svg"))
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


def test_plan_says_what_of_a_config_only_a_job_can_fill_in(tmp_path):
    path = tmp_path / "hf.json"
    params = {"lr": "auto", "sync_every": {"params": 10}}
    path.write_text(json.dumps({"optimizer": {"params": params}, "deslo": {"replica_size": "auto"}}))
    plan = answer(
        "plan", "--config", str(path), "--params", "1M", "--gbps", "1", "--step-ms", "10", "--replica-size", "8"
    )
    assert any(each.startswith("optimizer.params.lr has its default") for each in plan["assumptions"])
    assert plan["replica_size"] == 8 and plan["states"][0]["period"] == 10


def test_plan_refuses_a_file_that_no_job_of_ours_reads(tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text("distributed_type: FSDP\n")
    words = 'expected a file with an "optimizer" or a "deslo" block'
    assert (
        words in run("plan", "--config", str(path), "--params", "1M", "--gbps", "1", "--step-ms", "10", status=2).stderr
    )


MISTAKES = {
    "no model": (["--step-ms", "1"], "--params, --model: expected one of them, got none"),
    "two models": (["--params", "1B", "--model", "x:y", "--step-ms", "1"], "got both"),
    "no time": (["--params", "1B"], "--step-ms: expected the measured time of a step"),
    "half an estimate": (["--params", "1B", "--mfu", "0.4"], "got only --mfu"),
    "two times": (["--params", "1B", "--mfu", "0.4", "--step-ms", "1"], "keep the measured one"),
    "mfu in percent": (
        ["--params", "1B", "--mfu", "40", "--tokens-per-step", "1", "--peak-tflops", "1"],
        "--mfu: expected a number in (0, 1]",
    ),
    "time of 0": (["--params", "1B", "--step-ms", "0"], "--step-ms: expected a number > 0"),
    "replica size": (["--params", "1B", "--step-ms", "1", "--replica-size", "8"], "expected 2, as deslo.replica_size"),
    "count": (["--params", "many", "--step-ms", "1"], "a number like 124439808, 350M or 1.3B"),
    "dtype": (["--params", "1B", "--step-ms", "1", "--gradient-dtype", "int8"], "one of float32, bfloat16, float16"),
    "two links": (
        ["--params", "1B", "--step-ms", "1", "--link", DES_LOC],
        "--gbps, --link: expected one of them, got both",
    ),
    "plot": (["--params", "1B", "--step-ms", "1", "--plot", "x.doc"], "ends in one of .png, .svg, .pdf"),
    "model": (["--model", "nowhere", "--step-ms", "1"], "package.module:function"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_plan_says_what_to_do_about_a_mistake(name):
    extra, words = MISTAKES[name]
    error = run(*PLAN, *extra, status=2).stderr
    assert words in error and "Traceback" not in error


def test_an_unreadable_hugging_face_config_is_said_in_one_sentence(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "no such model"}')
    assert run(*PLAN, "--model", str(path), "--step-ms", "1", status=2).stderr.count("\n") == 1


def test_probe_wants_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun" in run("probe", status=2).stderr


def test_doctor_alone_steps_the_config_and_says_what_it_could_not_see(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"deslo": {"replica_size": 8}}))
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


def torchrun(size: int, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
    command += ["-m", "deslo_plugin.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment)


def test_a_launched_doctor_counts_what_it_planned_with_deepspeed():
    launched = torchrun(4, "doctor", "--config", DES_LOC, "--json")
    assert launched.returncode == 0, launched.stderr[-3000:]
    checks = {each["name"]: each for each in json.loads(launched.stdout)["checks"]}
    assert checks["replicas"]["found"].startswith("2 replica(s) of 2 rank(s) on 1 node(s), gloo")
    assert "2 with DeepSpeed" in checks["steps"]["found"]
    assert checks["bytes"] == {
        "name": "bytes",
        "status": "ok",
        "do": "",
        "found": "counted as planned: params 16,644, exp_avg 16,640, exp_avg_sq 16,640",
    }
    assert "Gbit/s" in checks["link"]["found"]


def test_a_launched_doctor_ends_in_1_if_the_config_does_not_fit_the_world():
    launched = torchrun(3, "doctor", "--config", DES_LOC)
    assert launched.returncode == 1
    assert "a divisor of the world size 3" in " ".join(launched.stdout.replace("│", "").split())


def test_a_link_that_was_probed_is_one_to_plan_with(tmp_path):
    launched = torchrun(2, "probe", "--replica-size", "1", "--mb", "4", "--rounds", "5", "--json")
    assert launched.returncode == 0, launched.stderr[-3000:]
    measured = json.loads(launched.stdout)
    low, high = measured["quartiles"]["gbit_per_s"]
    assert 0 < low <= measured["gbit_per_s"] <= high and measured["latency_ms"] > 0
    assert measured["replicas"] == 2 and "loopback" in measured["warnings"][0]
    path = tmp_path / "link.json"
    path.write_text(launched.stdout)
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
