"""A Lightning Trainer with our callback: four ranks under DDP and FSDP2, and one process; skipped without Lightning."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning", reason="pip install 'deslo-plugin[lightning]'")

import deslo_plugin
from deslo_plugin.frameworks.lightning import DesLocCallback
from deslo_plugin.frameworks.lightning_checks import refuse
from tests.support import lightning_jobs as jobs
from tests.support.engine_configs import ds_config
from tests.support.oracle import blocks
from tests.support.theory import RULES

S, STEPS = RULES["des-loc-adam"], 7
STOCK = {"deslo": {"replica_size": 2, "sync_every": {"params": 3, "exp_avg": 6, "exp_avg_sq": 12}}}
KINDS = ["ddp", "fsdp"]


def config(**deslo):
    made = blocks(S, replica_size=2)
    return made | {"deslo": made["deslo"] | deslo}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[state][name] - other[state][name]).abs().max()) for state in one for name in one[state])


def mean_of(several):
    return {name: torch.stack([each[name] for each in several]).double().mean(0) for name in several[0]}


@pytest.mark.parametrize("kind, optimizer", [("ddp", "DesLoc"), ("ddp", "AdamW"), ("fsdp", "DesLoc")])
def test_a_trainer_trains_as_the_plain_loop(four, tmp_path, kind, optimizer):
    """With accumulation and clipping; the replicas end as their mean, and loggers have heard of averages."""
    given = config() if optimizer == "DesLoc" else STOCK
    results = four().run(jobs.both, kind, given, optimizer, STEPS, str(tmp_path))
    for fitted, looped in results:
        assert largest_difference(fitted["states"], looped) <= 1e-6
        assert fitted["bytes"]["params"] > 0
    mean = mean_of([fitted["states"]["params"] for fitted, _ in results])
    for fitted, _ in results:
        assert all((fitted["end"][name] - mean[name]).abs().max() < 1e-6 for name in mean)
    assert "deslo_bytes/params" in results[0][0]["rows"]


def test_one_process_trains_as_the_plain_loop():
    fitted, looped = jobs.both("single", config(replica_size=1), "DesLoc", STEPS)
    assert largest_difference(fitted["states"], looped) <= 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_trains_as_the_bare_engine_and_resumes_to_the_bit(four, tmp_path, stage):
    ds = ds_config(S, stage, train_micro_batch_size_per_gpu=2, steps_per_print=10**9)
    ds["deslo"] |= {"checkpoint_mode": "per_replica"}
    del ds["gradient_accumulation_steps"], ds["gradient_clipping"]  # are Lightning's to fill in
    for result in four().run(jobs.engines, ds, str(tmp_path), 4, STEPS):
        assert largest_difference(result["once"], result["bare"]) <= 1e-6
        assert largest_difference(result["once"], result["again"]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["averaged", "synchronized"])
def test_model_checkpoint_saves_the_mean_and_a_fit_resumes_from_it(four, tmp_path, kind, mode):
    results = four().run(jobs.resumed, kind, config(checkpoint_mode=mode), str(tmp_path), 4, STEPS)
    begins = [result["once begins"] for result in results]
    apart = largest_difference(begins[0], begins[-1])
    for result in results:
        assert result["again steps"] == result["once steps"] == STEPS
        for state, weights in result["again begins"].items():
            mean = mean_of([begin[state] for begin in begins])
            assert all((weights[name] - mean[name]).abs().max() < 1e-6 for name in mean)
        if mode == "synchronized":
            assert largest_difference(result["once ends"], result["again ends"]) == 0
    assert (apart == 0) == (mode == "synchronized")


def test_validation_sees_the_mean_and_training_goes_on_from_its_own_weights(four):
    results = four().run(jobs.validated, config(), STEPS)
    for step in range(STEPS):
        mean = mean_of([own[step] for _, own in results])
        for seen, _ in results:
            assert all((seen[-STEPS:][step][name] - mean[name]).abs().max() < 1e-6 for name in mean)
    alone = four().run(jobs.loop, "ddp", config(), "DesLoc", STEPS)
    for (_, own), states in zip(results, alone):
        assert largest_difference({"params": own[-1]}, {"params": states["params"]}) <= 1e-6


def test_what_cannot_be_attached_is_an_error_on_every_rank(four):
    for said in four().run(jobs.refused, "single", config()):
        assert "SingleDeviceStrategy: expected one process, got a world of 4; use strategy=" in said
    for said in four().run(jobs.refused, "ddp", config(checkpoint_mode="per_replica")):
        assert 'deslo.checkpoint_mode: expected "averaged" or "synchronized" under Lightning' in said


def strategy(*names, **attributes):
    kind = object
    for name in reversed(names):
        kind = type(name, (kind,), {})
    made = kind()
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize(
    "given, message",
    [
        ({"strategy": strategy("Own")}, "Trainer(strategy=...): expected one of DDPStrategy, DeepSpeedStrategy"),
        ({"strategy": strategy("FSDPStrategy")}, "got FSDPStrategy; use ModelParallelStrategy("),
        ({"strategy": strategy("XLAStrategy", "DDPStrategy")}, "got XLAStrategy; use DDPStrategy"),
        ({"strategy": strategy("DDPStrategy", _ddp_comm_hook=print)}, "DDPStrategy(ddp_comm_hook=...): expected none"),
        ({"config": {}, "strategy": strategy("DeepSpeedStrategy")}, "DesLocCallback(config): expected none beside"),
        ({"replicate": "tp"}, "DesLocCallback(replicate=...): expected none beside a DDPStrategy, got 'tp'; remove it"),
        ({"callbacks": [strategy("EMAWeightAveraging", "WeightAveraging")]}, "one replica's own"),
        ({"callbacks": [DesLocCallback(), DesLocCallback()]}, "expected one DesLocCallback, got 2; keep one"),
    ],
)
def test_a_trainer_that_would_cross_replicas_is_refused(given, message):
    trainer = SimpleNamespace(
        strategy=given.get("strategy", strategy("DDPStrategy")), callbacks=given.get("callbacks", [])
    )
    with pytest.raises(deslo_plugin.ConfigError) as error:
        refuse(trainer, torch.nn.Linear(1, 1), given.get("config"), given.get("replicate"))
    assert message in str(error.value)


def test_a_module_is_fitted_once():
    module, callback = jobs.module_of(config(replica_size=1), "DesLoc"), DesLocCallback()
    jobs.trainer_of("single", [callback], 1).fit(module, jobs.batches(1))
    with pytest.raises(deslo_plugin.ConfigError, match="Trainer.fit.module.: expected a module that was not fitted"):
        jobs.trainer_of("single", [DesLocCallback()], 1).fit(module, jobs.batches(1))
