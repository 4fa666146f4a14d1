"""What users of DDP and FSDP2 do beside training: precision, offload, checkpointing, buffers, GradScaler, export."""

import pytest
import torch

import deslo_plugin
from tests.support import torch_error_jobs, torch_use_jobs
from tests.support import torch_jobs as jobs
from tests.support.oracle import blocks
from tests.support.theory import RULES, assert_oracle, oracle_states

S = RULES["mt-dao-adam-n2"]
LOCAL = blocks(S, replica_size=1)


def same(results, others, tolerance=0.0):
    for a, b in zip(results, others):
        for state, tensors in a["states"].items():
            for name, tensor in tensors.items():
                assert (tensor - b["states"][state][name].to(tensor.dtype)).abs().max() <= tolerance, (state, name)


@pytest.mark.parametrize("wrap", ["fsdp", "hsdp"])
@pytest.mark.parametrize("variant", ["cpu offload", "no reshard", "reshard to 1", "checkpointing", "compiled block"])
def test_variants_of_fsdp_train_as_the_oracle(four, wrap, variant):
    results = four().run(torch_use_jobs.fsdp_variant, wrap, variant, blocks(S), 14)
    assert_oracle(results, oracle_states(S, 14))


@pytest.mark.parametrize("wrap", ["fsdp", "hsdp"])
def test_mixed_precision_keeps_float32_states(four, wrap):
    results = four().run(torch_use_jobs.fsdp_variant, wrap, "mixed precision", blocks(S), 14)
    assert_oracle(results, oracle_states(S, 14), tolerance=0.02)
    assert all(t.dtype == torch.float32 for r in results for tensors in r["states"].values() for t in tensors.values())


@pytest.mark.parametrize(
    "warm_up, options",
    [
        (0, {"find_unused_parameters": True}),
        (0, {"static_graph": True}),
        (0, {"gradient_as_bucket_view": True}),
        (5, {"find_unused_parameters": True}),
        (5, {"gradient_as_bucket_view": True}),
    ],
    ids=str,
)  # static_graph cannot begin with no_sync while DDP reduces: torch's own limit
def test_options_of_ddp_change_nothing(four, warm_up, options):
    config = blocks(S, replica_size=1, synchronous_steps=warm_up)
    results, plain = (four().run(jobs.run, "ddp", config, 14, None, None, each) for each in (options, {}))
    same(results, plain, tolerance=1e-6 if warm_up else 0.0)  # DDP's buckets, and with them its rounding, differ


def test_ddp_on_the_ranks_of_a_replica_is_the_hierarchical_form(four):
    own, of_world = (four().run(jobs.run, wrap, blocks(S, replica_size=2), 14) for wrap in ("ddp of a replica", "ddp"))
    same(own, of_world)


def test_running_statistics_average_with_the_parameters(four):
    for result in four().run(torch_use_jobs.batch_norm, blocks(S, replica_size=1, average_at="after_step"), 2):
        assert result["equal at 2"] and not result["equal at 1"]
        assert result["bytes"]["buffers"] == 2 * 4 * 4  # mean and variance of 4 features, once
        assert result["tracked"] == 2 * 2  # steps x micro-batches, counted by each replica itself


@pytest.mark.parametrize("wrap, stock", [("plain", False), ("plain", True), ("ddp", False), ("ddp", True)])
def test_a_step_that_the_grad_scaler_skips_on_one_replica_still_ticks_and_averages(four, wrap, stock):
    """Rank 1 overflows at step 2: its state stays, its clock does not, and all meet at step 4."""
    results = four().run(torch_use_jobs.scaled, wrap, stock, 5)
    assert [result["skipped"] for result in results] == [0, 1, 0, 0]
    assert [result["steps"] for result in results] == [5] * 4
    assert all(result["bytes"] == results[0]["bytes"] for result in results)
    assert results[1]["moved at 2"] is False and results[0]["moved at 2"] is True


@pytest.mark.parametrize("wrap", ["plain", "ddp", "fsdp", "hsdp"])
def test_the_exported_model_is_the_mean_of_the_replicas(four, wrap):
    results = four().run(torch_use_jobs.exported, wrap, blocks(S) if wrap != "ddp" else LOCAL, 7)
    states = [result["state"] for result in results]
    for name, mean in states[0].items():
        own = torch.stack([result["own"][name].double() for result in results]).mean(0)
        assert torch.allclose(mean.double().flatten(), own, atol=1e-6) and all(
            torch.equal(s[name], mean) for s in states
        )


def test_a_model_can_still_be_copied_and_pickled(four):
    assert four().run(torch_use_jobs.copied, LOCAL) == [True] * 4


def test_replicas_that_start_unequal_are_refused_or_made_equal(four):
    errors = four().run(torch_error_jobs.unequal, "check")
    assert all("initial value of parameter 0.weight: expected" in e and "seed every rank alike" in e for e in errors)
    assert four().run(torch_error_jobs.unequal, "broadcast") == ["equal"] * 4


@pytest.mark.parametrize("stock", [False, True])
def test_a_script_started_as_one_process_trains_as_the_plain_optimizer(stock):
    models = [jobs.net(), jobs.net()]
    make = lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    plain, ours = make(models[0]), make(models[1])
    blocks = {"optimizer": {"params": {"lr": 1e-2}}}
    if stock:
        attachment = deslo_plugin.attach(
            models[1], ours, {"deslo": {"sync_every": {"params": 2, "exp_avg": 2, "exp_avg_sq": 2}}}
        )
    else:
        ours = deslo_plugin.DesLoc(models[1].parameters(), blocks)
        attachment = deslo_plugin.attach(models[1], ours)
    for step in range(5):
        for model, optimizer in zip(models, (plain, ours)):
            jobs.loss_of(model, jobs.batch(0, step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    exported = deslo_plugin.averaged_state_dict(models[1])
    assert all(torch.allclose(p, exported[name], atol=1e-6) for name, p in models[0].named_parameters())
    assert "nothing to average" in attachment.plan.describe()
