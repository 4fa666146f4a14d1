"""The main job: the model, the text, every framework, and the whole command on two processes for a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.harness.command import arguments, synchronous
from examples.harness.corpus import Windows, load_bytes, split
from examples.harness.gpt import GPT, GPTConfig
from tests.support import example_jobs as jobs

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--steps", "12", "--dim", "32", "--layers", "2", "--heads", "1", "--context", "32"]


def test_the_model_does_not_look_ahead():
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, layers=2, heads=2, context=16))
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-5)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-5)


def test_training_and_held_out_text_share_no_window(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 12_000)
    corpus = load_bytes(tmp_path / "text.txt")
    train, held_out = split(corpus, 0.25)
    assert 0 < len(held_out) < len(corpus) / 2 and len(train) + len(held_out) <= len(corpus)
    one, again, other = Windows(train, 32, 0), Windows(train, 32, 0), Windows(train, 32, 1)
    assert all(torch.equal(a, b) for a, b in zip(one[3], again[3]))
    assert not all(torch.equal(a, b) for a, b in zip(one[3], other[3]))
    tokens, targets = one[0]
    assert torch.equal(tokens[1:], targets[:-1])


def test_the_text_needs_no_download():
    assert len(load_bytes(None)) > 1_000_000


def test_a_missing_text_is_a_sentence(tmp_path):
    with pytest.raises((SystemExit, ValueError, OSError), match="nothing-here"):
        load_bytes(tmp_path / "nothing-here")


def test_the_command_trains_both_ways_and_prints_the_table(tmp_path):
    (tmp_path / "text.txt").write_bytes(Path(torch.__file__).read_bytes()[:60_000] * 8)
    tiny = [
        "--steps",
        "6",
        "--processes",
        "2",
        "--replica-size",
        "1",
        "--dim",
        "32",
        "--layers",
        "1",
        "--heads",
        "1",
        "--context",
        "32",
    ]
    config = ROOT / "configs" / "des-loc-adam.json"
    done = subprocess.run(
        [sys.executable, ROOT / "examples/train.py", "--config", config, "--data", tmp_path / "text.txt", *tiny],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for words in (
        "des-loc-adam",
        "synchronous-adamw",
        "validation loss",
        "times less than synchronous",
        "2 replicas of 1 rank",
    ):
        assert words in done.stdout, done.stdout[-2000:]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A config with uneven periods and two micro-batches a step, and the options that train it for a few steps."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "text.txt").write_bytes(Path(torch.__file__).read_bytes()[:60_000] * 8)
    config = json.loads((ROOT / "configs" / "des-loc-adam.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    config["optimizer"]["params"]["sync_every"] = {"params": 3, "exp_avg": 4, "exp_avg_sq": 5}
    (folder / "desynchronised.json").write_text(json.dumps(config))
    adamw = synchronous(config)
    (folder / "synchronous.json").write_text(json.dumps(adamw))
    scheduled = {"replica_size": 2, "sync_every": config["optimizer"]["params"]["sync_every"]}
    (folder / "stock.json").write_text(json.dumps(adamw | {"deslo": scheduled}))
    return config, lambda name: ["--config", str(folder / f"{name}.json"), "--data", str(folder / "text.txt"), *TINY]


def test_every_framework_gives_the_same_losses(four, job):
    _, options = job
    ours, alone = options("desynchronised"), [*options("desynchronised"), "--replica-size", "1"]
    results = {each: four().run(jobs.trained, each, ours)[0] for each in ("deepspeed", "ddp", "fsdp", "accelerate")}
    for loss, _, replicas in results.values():
        assert abs(loss - results["deepspeed"][0]) < 1e-5 and replicas == 2, results
    assert results["deepspeed"][1] == results["fsdp"][1] == results["ddp"][1], results
    (bare, sent, replicas), (zero, *_) = (four().run(jobs.trained, each, alone)[0] for each in ("torch", "deepspeed"))
    assert abs(bare - zero) < 1e-5 < abs(bare - results["ddp"][0]) and replicas == 4
    assert sent.keys() == {"params", "exp_avg", "exp_avg_sq"}


def test_a_stock_optimizer_on_a_schedule_gives_the_same_losses(four, job):
    _, options = job
    losses = [four().run(jobs.trained, each, options("stock"))[0][0] for each in ("deepspeed", "fsdp", "accelerate")]
    assert max(losses) - min(losses) < 1e-5, losses


def test_every_framework_trains_synchronously_without_the_block(four, job):
    _, options = job
    given = [*options("synchronous"), "--replica-size", "2"]
    losses = {
        framework: four().run(jobs.trained, framework, given)[0][0]
        for framework in ("deepspeed", "ddp", "fsdp", "accelerate")
    }
    assert max(losses.values()) - min(losses.values()) < 1e-5, losses


@pytest.mark.parametrize(
    "params",
    [
        {"total_num_steps": 30, "warmup_num_steps": 7, "warmup_type": "linear", "cos_min_ratio": 0.1},
        {"total_num_steps": 25, "warmup_num_steps": 1, "warmup_min_ratio": 0.2},
        {"total_num_steps": 40, "warmup_num_steps": 12},
    ],
    ids=str,
)
def test_the_lr_is_deepspeeds_to_the_bit(four, params):
    ours, theirs = four().run(jobs.learning_rates, 45, params)[0]
    assert ours == theirs


def test_a_key_that_only_deepspeed_has_is_refused_elsewhere(job, tmp_path):
    from examples.harness.worker import load_config

    config, _ = job
    (tmp_path / "bf16.json").write_text(json.dumps(config | {"bf16": {"enabled": True}}))
    with pytest.raises(ValueError, match="got bf16; remove"):
        load_config(arguments(["--config", str(tmp_path / "bf16.json"), "--framework", "ddp"]))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--framework torch --replica-size 2", "--replica-size: expected 1"),
        ("--framework ddp --zero-stage 3", "--zero-stage: expected --framework deepspeed"),
        ("--framework jax", "invalid choice"),
    ],
)
def test_options_that_do_not_go_together_are_sentences(options, sentence, capsys):
    with pytest.raises(SystemExit):
        arguments(["--config", str(ROOT / "configs" / "des-loc-adam.json"), *options.split()])
    assert sentence in capsys.readouterr().err
