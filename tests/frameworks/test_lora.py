"""Adapters of peft: they alone train, travel and are saved, under what people wrap them in."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support import lora_jobs as jobs


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_only_adapters_train_travel_and_are_saved(four, tmp_path, kind):
    results = four().run(jobs.trained, kind, str(tmp_path))
    for result in results:
        assert result["base kept"] and result["moved"] > 1e-3 and result["apart"] > 1e-4
        for name, mean in result["means"].items():
            torch.testing.assert_close(result["averaged"][name], mean, rtol=0, atol=1e-6)
    averages = {"params": 3, "exp_avg": 2, "exp_avg_sq": 1}
    for state, times in averages.items():  # both ranks of a replica send their half
        sent = sum(result["bytes"][state] for result in results) / 2
        assert times * 4 * results[0]["elements"] <= sent <= times * 4 * (results[0]["elements"] + 64), state
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(results[0]["averaged"])
    for name, value in saved.items():
        own = name.replace(".weight", ".default.weight")
        assert torch.equal(value, results[0]["averaged"][own]), name
