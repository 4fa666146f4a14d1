"""The main job: the model, the text, and the whole command on two processes for a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from corpus import Windows, load_bytes, split  # noqa: E402
from gpt import GPT, GPTConfig  # noqa: E402


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
    tiny = "--steps 6 --processes 2 --replica-size 1 --dim 32 --layers 1 --heads 1 --context 32".split()
    config = ROOT / "configs" / "des-loc-adam.json"
    done = subprocess.run(
        [sys.executable, ROOT / "examples/train.py", "--config", config, "--data", tmp_path / "text.txt", *tiny],
        capture_output=True, text=True, timeout=280, cwd=tmp_path, env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("des-loc-adam", "synchronous-adamw", "validation loss", "times less than synchronous", "2 replicas of 1 rank"):
        assert words in done.stdout, done.stdout[-2000:]
