"""From a universal checkpoint of DeepSpeed to replicas, and from ours to tools and jobs that know DeepSpeed alone."""

import re
from dataclasses import replace

import pytest
import torch

import deslo_plugin
from deslo_plugin import ConfigError
from tests.support import checkpoint_configs, checkpoint_jobs, synchronous_jobs
from tests.support.engine_configs import ds_config
from tests.support.oracle import blocks
from tests.support.theory import RULES

S, STEPS = RULES["des-loc-adam"], 5
KINDS = {"zero 1": 1, "zero 2": 2, "zero 3": 3, "ddp": None, "fsdp": None}


def config_of(kind: str, s=S, **deslo) -> dict:
    if KINDS[kind] is not None:
        return ds_config(s, KINDS[kind], deslo=deslo)
    return blocks(s, **({"replica_size": 2} if kind == "ddp" else {}) | deslo)


@pytest.fixture(scope="module")
def universal(four, tmp_path_factory):
    """Folders of two synchronous runs without us, by their ZeRO stage, and what they had."""
    found = {}
    for stage in (2, 3):
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        states, *_ = four().run(synchronous_jobs.universal_of_deepspeed, stage, str(folder), STEPS)
        found[stage] = folder, states
    return found


@pytest.mark.parametrize(("kind", "stage"), [("zero 2", 2), ("zero 3", 3), ("fsdp", 2), ("ddp", 3), ("zero 1", 3)])
def test_replicas_start_from_a_universal_checkpoint(four, universal, kind, stage):
    folder, states = universal[stage]
    for result in four().run(checkpoint_jobs.loaded, kind, config_of(kind), str(folder / "universal")):
        assert result["steps"] == STEPS
        for state, tensors in states.items():
            for name, tensor in tensors.items():
                assert torch.equal(result["states"][state][name], tensor), (state, name)


def test_an_engine_goes_on_from_latest_universal_as_from_the_run_itself(four, universal):
    """With load_universal in the JSON, where DeepSpeed would look: steps, schedule and further steps."""
    folder, states = universal[2]
    ds = ds_config(S, 2, checkpoint={"load_universal": True}, scheduler=synchronous_jobs.SCHEDULE)
    results = four().run(synchronous_jobs.goes_on, ds, str(folder), 3)
    assert all(result["loaded"] == states["params"]["0.weight"].tolist() for result in results)
    assert all(result["steps"] == result["global_steps"] == STEPS + 3 for result in results)
    assert all(result["lr"] == synchronous_jobs.rate_after(STEPS + 3) for result in results)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_exported_is_read_by_deepspeeds_own_tools_and_engines(four, tmp_path, stage):
    four().run(checkpoint_jobs.saved, "zero 2", config_of("zero 2"), str(tmp_path / "ours"), "averaged", STEPS)
    made = deslo_plugin.export_deepspeed(tmp_path / "ours", tmp_path / "theirs")
    assert made == tmp_path / "theirs" / f"global_step{STEPS}"
    weights = deslo_plugin.load_averaged_state_dict(tmp_path / "ours")
    for found in four().run(synchronous_jobs.read_by_deepspeed, stage, str(tmp_path / "theirs")):
        assert found["steps"] == STEPS
        for name, weight in weights.items():
            assert torch.equal(found["tools"][name], weight) and torch.equal(found["engine"][name], weight), name
        assert all(found["exp_avg_sq"][name].any() for name in weights)
    mean = torch.load(made / "zero" / "0.weight" / "exp_avg.pt", weights_only=True)["param"]
    for result in four().run(checkpoint_jobs.loaded, "fsdp", config_of("fsdp"), str(made)):  # and by us
        assert result["steps"] == STEPS and torch.equal(result["states"]["exp_avg"]["0.weight"], mean.flatten())


def test_what_a_universal_checkpoint_cannot_give_is_refused_on_every_rank(four, universal, tmp_path):
    folder = str(universal[2][0] / "universal")
    for s, message in (
        (
            RULES["mt-dao-adam-n2"],
            "expected rule adam or adopt with exp_avg and exp_avg_sq, .* got rule adam with exp_a",
        ),
        (RULES["des-loc-sgdm"], "got rule sgdm with exp_avg; take such a rule, or begin with the weights alone"),
        (replace(S, rule="adopt"), "expected states of ADOPT, .* got Adam's"),
        (replace(S, outer=(0.7, 0.9)), "with exp_avg, exp_avg_sq and an outer optimizer; take such a rule"),
    ):
        for error in four().run(checkpoint_jobs.refused, "zero 2", config_of("zero 2", s), folder):
            assert re.match(f"ConfigError: load.*{message}", error), error
    wide = four().run(synchronous_jobs.wider_refused, config_of("zero 2"), folder)
    assert all(re.search(r"0.weight: expected the parameters of this model, .9, 6., got .8, 6.;", e) for e in wide), (
        wide
    )


def test_an_export_neither_replaces_nor_leaves_out_in_silence(tmp_path):
    saved = checkpoint_configs.saved(tmp_path / "ours")
    made = deslo_plugin.export_deepspeed(saved, tmp_path / "theirs", tag="final")
    assert (made / "zero/0.weight/exp_avg.pt").is_file() and not (made / "zero/0.weight/exp_avg_2.pt").exists()
    with pytest.raises(ConfigError, match="export_deepspeed.*expected a new folder, got .*final; give another"):
        deslo_plugin.export_deepspeed(saved, tmp_path / "theirs", tag="final")
    (saved / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match="index.json"):
        deslo_plugin.export_deepspeed(saved, tmp_path / "other")


def test_a_name_in_a_checkpoint_leads_to_no_other_folder(tmp_path):
    model = torch.nn.Module()
    model.register_parameter("up/elsewhere", torch.nn.Parameter(torch.ones(2)))
    deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), lr=1e-3))
    deslo_plugin.save(tmp_path / "saved", model, mode="averaged")
    with pytest.raises(ConfigError, match="names of folders, as DeepSpeed's layout has them, got 'up/elsewhere'"):
        deslo_plugin.export_deepspeed(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()
