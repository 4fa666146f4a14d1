"""Every shipped config is read, planned and stepped, under ZeRO 0, 2 and 3."""

import json
from pathlib import Path

import pytest
import torch

from deslo_plugin import DesLoc, load_config
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.config.shipped import find_config
from deslo_plugin.planning.plan import make_plan
from tests.support import jobs

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
NAMED = {
    "local-adam",
    "favg+opt",
    "favg-opt",
    "diloco",
    "des-loc-sgdm",
    "des-loc-adam",
    "des-loc-adam-qh",
    "des-loc-adopt",
    "des-loc-nesterov",
    "muon",
    "muloco",
    "mt-dao-muon",
    "mt-dao-int8",
    *(f"mt-dao-{rule}-{kind}" for rule in ("sgdm", "adam", "adopt") for kind in ("qh", "n2")),
}
NEED_MATRICES = ("muon", "muloco", "mt-dao-muon")  # which ZeRO-3 cuts


def test_every_named_case_has_its_file():
    assert {path.stem for path in CONFIGS} == NAMED


def test_a_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {find_config(name).resolve() for name in NAMED} == set(CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_explains_itself_plans_and_steps_alone(path):
    blocks = json.loads(path.read_text())
    config = load_config(path)
    assert all(isinstance(line, str) and line for line in blocks["comment"])
    plan = make_plan(config, [1000], [config.optimizer.periods], contiguous(4, 0, 2))
    # times fewer vectors than synchronous; of a byte for each element in place of four, fewer still
    assert 1 / plan.vectors_per_step >= (2.5 if config.deslo.wire.quantizes else 8)
    weights = torch.nn.Parameter(torch.ones(5))
    optimizer = DesLoc([weights], config)
    for _ in range(3):
        weights.grad = weights.detach().clone()
        optimizer.step()
    assert weights.abs().max() < 1


@pytest.mark.parametrize(
    "path, stage",
    [(path, stage) for path in CONFIGS for stage in (0, 2, 3) if stage < 3 or path.stem not in NEED_MATRICES],
    ids=lambda each: getattr(each, "stem", each),
)
def test_a_shipped_config_trains_under_deepspeed(four, path, stage):
    ds = json.loads(path.read_text())
    ds["zero_optimization"]["stage"] = stage
    ds["scheduler"]["params"] |= {"total_num_steps": 40, "warmup_num_steps": 2}
    ds["train_micro_batch_size_per_gpu"] = jobs.MICRO_BATCH
    if "synchronous_steps" in ds["deslo"]:
        ds["deslo"]["synchronous_steps"] = 1  # as short as the run
    for result in four().run(jobs.run, ds, 34):
        assert result["events"]["params"] == 16  # the biases of our net have a period of their own, 2
        assert all(torch.tensor(loss).isfinite() for loss in result["losses"])
