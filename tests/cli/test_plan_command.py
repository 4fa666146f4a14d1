"""``deslo plan`` and ``deslo plot``: figures worked out by hand, assumptions, and what every mistake is told."""

import json
import sys
from pathlib import Path

import pytest

from deslo_plugin.cli.model_size import parse_count
from tests.support.command_line import DES_LOC, answer, run

PLAN = ["plan", "--config", DES_LOC, "--replicas", "4", "--gbps", "10", "--latency-ms", "1"]


GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}


def test_plan_prints_hand_computed_figures():
    plan = answer(*PLAN, "--params", "1B", "--step-ms", "1000", "--steps", "193")
    own, in_turn, synchronous, *_ = plan["methods"]
    assert plan["parameters"] == 10**9 and plan["replica_size"] == 2
    # and a word with what is due; 193 steps: params after 32, 64, ..., 192, exp_avg after 96 and 192, exp_avg_sq after
    # 192; 2 GB from each of 2 ranks
    assert own["bytes_per_rank_by_state"] == {"params": 12e9 + 6 * 4, "exp_avg": 4e9, "exp_avg_sq": 2e9}
    assert synchronous["bytes_per_rank"] == 193 * 2 * 10**9
    vector = 2 * 4e9 * 8 / 1e10 * (1 - 1 / 4) + 0.001 * 30  # 2 GB are 30 buckets of 64 MiB
    word = 0.001  # by which replicas agree that an overlapped average may land
    waited = 4 * (vector - 1) + (2 * vector - 1) + (3 * vector - 1) + 6 * word
    assert own["exposed_ms_per_step"] == pytest.approx(1e3 * waited / 193)
    assert in_turn["exposed_ms_per_step"] == pytest.approx(1e3 * 9 * vector / 193)
    assert own["longest_wait_s"] == pytest.approx(3 * vector - 1 + word)
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
