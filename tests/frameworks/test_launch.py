"""Whole launches: ``accelerate launch``, torchrun and the Hugging Face Trainer, 4 processes each."""

import shutil

import pytest
import torch

from tests.support.trainer_example import BIN, ROOT, TORCHRUN, run_example, run_on_forked_ranks

LAUNCHES = {
    "DDP, accelerate launch": [
        str(BIN / "accelerate"),
        "launch",
        "--multi_gpu",
        "--num_processes",
        "4",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ],  # the script itself says CPU
    "FSDP2, torchrun": [*TORCHRUN, str(ROOT / "tests" / "support" / "fsdp_on_cpu.py")],
    "DeepSpeed, torchrun": TORCHRUN,
}


@pytest.fixture(scope="module")
def losses():
    return {}


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_trainer_learns_and_sends_what_was_planned(losses, name):
    result = run_example(LAUNCHES[name], ["--deepspeed"] if "DeepSpeed" in name else [])
    # ln 64 = 4.2 at the start; one average in 40 steps
    assert result["loss"] < 3 and list(result["bytes"]) == ["params"]
    losses[name] = result["loss"]
    if "FSDP2" in name and "DDP, accelerate launch" in losses:
        assert result["loss"] == pytest.approx(losses["DDP, accelerate launch"], abs=1e-3)  # one job, two frameworks


@pytest.mark.parametrize("name", ["DDP", "DeepSpeed"])
def test_what_the_trainer_saves_is_one_model_for_plain_transformers_and_resumes(tmp_path, name):
    from transformers import LlamaForCausalLM

    options = [*(["--deepspeed"] if name == "DeepSpeed" else []), "--save", str(tmp_path)]
    run_on_forked_ranks(tmp_path, options)
    tokens = (torch.arange(32)[None] + torch.arange(64)[:, None]) % 64
    for saved in ("checkpoint-20", "checkpoint-40"):
        model = LlamaForCausalLM.from_pretrained(tmp_path / saved)
        loss = model(input_ids=tokens, labels=tokens).loss.item()
        assert loss < (4.0 if saved == "checkpoint-20" else 3.0)
    shutil.rmtree(tmp_path / "checkpoint-40")
    resumed = run_on_forked_ranks(tmp_path, [*options, "--resume", str(tmp_path / "checkpoint-20")])
    assert resumed["loss"] < 3


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_accelerate_configs_are_ones_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes == 16 and config.num_machines == 2
    if config.distributed_type == "DEEPSPEED":
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()
