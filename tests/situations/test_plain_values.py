"""What a checkpoint may hold: plain values, which come back as they were; what others saved is called by its name."""

import os
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import deslo_plugin
from deslo_plugin.cli.app import app
from deslo_plugin.errors import ConfigError
from tests.support.checkpoint_configs import config_for, saved
from tests.support.checkpoint_jobs import Job, alone


def test_plain_values_come_back_as_they_were(tmp_path):
    import numpy as np

    extra = {
        "none": None,
        "flag": True,
        "whole": 2**70,
        "float": float("inf"),
        "complex": 1 + 2j,
        "text": "é",
        "bytes": b"\0\xff",
        "list": [1, [2.5]],
        "tuple": (1, ("a",)),
        3: {(1, 2): "key"},
        "ordered": OrderedDict(b=1, a=2),
        "counter": Counter({5: 2}),
        "tensor": torch.arange(6).view(2, 3),
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.ones(1)]), [2, 4]).state_dict(),
    }
    model, _ = alone()
    deslo_plugin.save(
        tmp_path / "c", model, extra=extra | {"numpy": np.float32(0.5), "count": np.int64(3), "is": np.bool_(True)}
    )
    loaded = deslo_plugin.load(tmp_path / "c", model)
    numbers = [loaded.pop(name) for name in ("numpy", "count", "is")]
    assert numbers == [0.5, 3, True] and [type(each) for each in numbers] == [float, int, bool]
    assert torch.equal(loaded.pop("tensor"), extra.pop("tensor"))
    assert loaded == extra and all(type(loaded[name]) is type(value) for name, value in extra.items())


class Settings(dict):
    pass


def itself() -> dict:
    loop: dict = {}
    loop["again"] = loop
    return loop


@pytest.mark.parametrize(
    "extra, said",
    [
        (
            {"a": [1, {"b": lambda: 0}]},
            r"save\(extra\)\['a'\]\[1\]\['b'\]: expected plain values .* got builtins.function; leave it out",
        ),
        ({"path": Path("x")}, r"\['path'\]: .* got pathlib.PosixPath"),
        ({"s": {1}}, r"\['s'\]: .* got builtins.set; give list\(value\)"),
        ({"c": Settings(a=1)}, r"\['c'\]: .* got .*Settings"),
        ({object(): 1}, r"a key of save\(extra\): .* got builtins.object"),
        (
            {"g": torch.optim.SGD([torch.ones(1)])},
            r"\['g'\]: .*SGD; give what it is made of, such as its state_dict\(\)",
        ),
        ({"n": torch.rand(2).numpy()}, r"\['n'\]: .* got numpy.ndarray; give torch.from_numpy"),
        (itself(), "containers that contain themselves"),
        ([("a", 1)], r"save\(extra\): expected a dict, got list"),
    ],
)
def test_what_is_no_data_is_refused_at_the_save(tmp_path, extra, said):
    model, _ = alone()
    with pytest.raises(ConfigError, match=said):
        deslo_plugin.save(tmp_path / "c", model, extra=extra)
    assert not list(tmp_path.iterdir())


def test_numpy_draws_the_same_numbers_after_an_exact_resume(tmp_path):
    import numpy as np

    np.random.seed(3)
    folder = saved(tmp_path / "c", "per_replica")
    drawn = np.random.rand(3).tolist()
    deslo_plugin.load(folder, alone()[0])
    assert np.random.rand(3).tolist() == drawn


def scaled(config: dict, folder: str) -> tuple[dict, dict]:
    """The numbers of the loss scaler at a save, and of a new engine that has loaded it."""
    from deepspeed.accelerator import get_accelerator

    def numbers(job: Job) -> dict:
        return {
            name: value
            for name, value in vars(job.model.optimizer.loss_scaler).items()
            if type(value) in (bool, int, float)
        }

    kind = type(get_accelerator())
    supported, kind.is_fp16_supported = kind.is_fp16_supported, lambda self: True
    try:
        config = config | {"fp16": {"enabled": True, "initial_scale_power": 6, "hysteresis": 1, "loss_scale_window": 2}}
        job = Job(f"zero {config['zero_optimization']['stage']}", config)
        job.train(range(5))
        deslo_plugin.save(folder, job.model)
        at_save = numbers(job)
        job.close()
        job = Job(job.kind, config)
        deslo_plugin.load(folder, job.model)
        loaded = numbers(job)
        job.close()
    finally:
        kind.is_fp16_supported = supported
    return at_save, loaded


@pytest.mark.parametrize("stage", [1, 3])
def test_the_loss_scale_of_an_engine_goes_on(four, tmp_path, stage):
    for at_save, loaded in four().run(scaled, config_for(f"zero {stage}"), str(tmp_path / "c")):
        assert loaded == at_save and at_save["cur_scale"] > 2**6


@pytest.mark.parametrize(
    "files, said",
    [
        (["mp_rank_00_model_states.pt"], "a checkpoint of DeepSpeed's own .*load_module_only=True"),
        (
            ["zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
            "a checkpoint of DeepSpeed's own .*load_module_only=True",
        ),
        (["latest", "global_step3/mp_rank_00_model_states.pt"], "a folder of checkpoints of DeepSpeed's own"),
        ([".metadata", "__0_0.distcp"], "a checkpoint of torch.distributed.checkpoint alone"),
        (["model.safetensors"], "exported weights"),
        (["step_1/deslo.json"], r"a folder of checkpoints; load\(deslo_plugin.latest_checkpoint\(path\), model\)"),
    ],
)
def test_what_others_saved_is_called_by_its_name(tmp_path, files, said):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("global_step3")
    with pytest.raises(ConfigError, match=f"a folder with deslo.json, got none, but {said}"):
        deslo_plugin.load(tmp_path, alone()[0])


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_inspecting_where_no_checkpoint_is_gives_a_sentence(tmp_path, monkeypatch, path):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    told = CliRunner().invoke(app, ["ckpt", "inspect", path])
    assert told.exit_code == 2 and "expected a folder with deslo.json" in told.stderr


def weights_by_the_script(config: dict, folder: str) -> list[dict | None]:
    """What the zero_to_fp32.py beside an engine's checkpoint writes, and what saved_state_dict gives."""
    import subprocess
    import sys

    import torch.distributed as dist

    job = Job("zero 2", config)
    job.train(range(2))
    job.model.save_checkpoint(folder, tag="a")
    job.train(range(2, 4))
    job.model.save_checkpoint(folder, tag="b")
    job.close()
    if dist.get_rank():
        return []
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
    environment["PYTHONPATH"] = str(Path(deslo_plugin.__file__).parent.parent)
    script = [sys.executable, f"{folder}/zero_to_fp32.py", folder]
    subprocess.run([*script, f"{folder}/latest.bin"], check=True, timeout=900, env=environment)
    subprocess.run([*script, f"{folder}/first", "-t", "a"], check=True, timeout=900, env=environment)
    return [
        torch.load(file, weights_only=True) for file in (f"{folder}/latest.bin", f"{folder}/first/pytorch_model.bin")
    ]


def test_the_script_beside_an_engines_checkpoints_writes_their_weights(four, tmp_path):
    (last, first), *_ = four().run(weights_by_the_script, config_for("zero 2"), str(tmp_path), timeout=900)
    for written, tag in ((last, "b"), (first, "a")):
        expected = deslo_plugin.load_averaged_state_dict(tmp_path / tag)
        assert written.keys() == expected.keys() and all(
            torch.equal(written[name], expected[name]) for name in expected
        )
