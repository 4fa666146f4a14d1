"""Checkpoints of replicas that differ: averaged, synchronised or exact; reshaped, torn, altered."""

import json
import random
import time

import pytest
import torch

import deslo_plugin
from tests.support import checkpoint_jobs as jobs
from tests.support import torch_jobs
from tests.support.checkpoint_configs import S, config_for, same
from tests.support.device import cpu_only
from tests.support.oracle import blocks
from tests.support.theory import RULES
from tests.support.worlds import STARTED, RankError

STOCK = {"deslo": {"sync_every": {"params": 3, "exp_avg": 6, "exp_avg_sq": 12}}}
KINDS = ["plain", "ddp", "fsdp", "hsdp", "zero 0", "zero 1", "zero 2", "zero 3"]


@pytest.mark.parametrize("before", [3, 4, 5])  # an average in flight, one step after it, in the middle of a period
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_resume_changes_no_bit(four, tmp_path, kind, before):
    for rank, result in enumerate(
        four().run(jobs.resumed, kind, config_for(kind), str(tmp_path / "c"), "per_replica", before, 6)
    ):
        same(result["straight"], result["loaded"])
        assert result["losses"] and result["random"] and result["extra"] == {"rank": rank, "batch": before}


# some land next
@pytest.mark.parametrize("kind, before", [("plain", 3), ("ddp", 6), ("hsdp", 4), ("zero 2", 6), ("zero 3", 7)])
def test_an_exact_resume_under_averages_that_fly_for_two_steps_changes_no_bit(four, tmp_path, kind, before):
    config = config_for(kind, sync_delay=2)
    for result in four().run(jobs.resumed, kind, config, str(tmp_path / "c"), "per_replica", before, 6):
        same(result["straight"], result["loaded"])


def test_an_exact_resume_keeps_the_samples_that_weigh_a_replica(four, tmp_path):
    for straight, loaded in four().run(
        jobs.resumed_with_samples, blocks(S, replica_weights="samples"), str(tmp_path / "c")
    ):
        same(straight, loaded)


@pytest.mark.parametrize("kind", ["plain", "hsdp", "zero 0", "zero 2", "zero 3"])
def test_an_exact_resume_in_bf16_changes_no_bit(four, tmp_path, kind):
    config = config_for(kind) | {"bf16": {"enabled": True}}
    for result in four().run(jobs.resumed, kind, config, str(tmp_path / "c"), "per_replica", 4, 6):
        same(result["straight"], result["loaded"])
        assert result["losses"]


@pytest.mark.parametrize("kind", ["plain", "hsdp"])
def test_an_exact_resume_of_a_stock_optimizer_changes_no_bit(four, tmp_path, kind):
    for result in four().run(
        jobs.resumed, kind, STOCK, str(tmp_path / "c"), "per_replica", 4, 6, jobs.torch_jobs_adamw
    ):
        same(result["straight"], result["loaded"])


def test_two_optimizers_of_one_model_resume_together(four, tmp_path):
    for result in four().run(jobs.two_optimizers, str(tmp_path / "c")):
        assert all(torch.equal(a, b) for a, b in zip(result["straight"], result["loaded"]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_saved_and_training_does_not_notice(four, tmp_path, kind):
    config = config_for(kind)
    results = four().run(jobs.saved, kind, config, str(tmp_path / "c"), "averaged", 5, 4)
    for result, alone in zip(results, four().run(jobs.unsaved, kind, config, 9)):
        same(result["before"], result["at save"])
        same(result["later"], alone)
    for result in four().run(jobs.loaded, kind, config, str(tmp_path / "c")):
        mean = {
            state: {name: torch.stack([r["before"][state][name].double() for r in results]).mean(0) for name in tensors}
            for state, tensors in result["states"].items()
        }
        same(result["states"], mean, tolerance=2e-7)
        assert result["steps"] == 5 and result["extra"] == {"rank": 0}


@pytest.mark.parametrize("kind", ["plain", "ddp", "hsdp", "zero 2"])
def test_sync_averages_in_place(four, tmp_path, kind):
    results = four().run(jobs.saved, kind, config_for(kind), str(tmp_path / "c"), "synchronized", 5)
    for result in results:
        same(result["at save"], results[0]["at save"])
    for result in four().run(jobs.loaded, kind, config_for(kind), str(tmp_path / "c")):
        same(result["states"], results[0]["at save"])


@pytest.mark.parametrize(
    "saver, loader",
    [
        ("hsdp", "plain"),
        ("plain", "hsdp"),
        ("zero 2", "hsdp"),
        ("hsdp", "zero 3"),
        ("zero 3", "ddp"),
        ("zero 1", "zero 3"),
        ("ddp", "zero 0"),
        ("fsdp 2x2", "fsdp 1x4"),
        ("fsdp 2x2", "fsdp 4x1"),
        ("fsdp 1x4", "zero 2"),
    ],
)
def test_an_average_loads_in_other_frameworks_on_other_replicas_and_shards(four, tmp_path, saver, loader):
    four().run(jobs.saved, saver, config_for(saver), str(tmp_path / "c"), "averaged", 5)
    there = four().run(jobs.loaded, saver, config_for(saver), str(tmp_path / "c"))[0]["states"]
    for result in four().run(jobs.loaded, loader, config_for(loader), str(tmp_path / "c")):
        same(result["states"], there)


def test_three_replicas_go_on_from_two(four, tmp_path):
    four().run(jobs.saved, "hsdp", blocks(S), str(tmp_path / "c"), "averaged", 5)
    there = four().run(jobs.loaded, "hsdp", blocks(S), str(tmp_path / "c"))[0]["states"]
    *three, _ = four().run(jobs.loaded_by_three, blocks(S), str(tmp_path / "c"))
    for result in three:
        same(result["states"], there)
        same(result["together"], three[0]["together"])


@cpu_only("DeepSpeed's ranks would share a device over gloo")
def test_weights_for_plain_torch_come_out_of_a_checkpoint(four, tmp_path):
    four().run(jobs.saved, "zero 3", config_for("zero 3"), str(tmp_path / "c"), "averaged", 5)
    there = four().run(jobs.loaded, "zero 3", config_for("zero 3"), str(tmp_path / "c"))[0]["states"]["params"]
    model = torch_jobs.net(seed=9)
    model.load_state_dict(deslo_plugin.load_averaged_state_dict(tmp_path / "c"))
    same({"params": {name: param.detach().flatten() for name, param in model.named_parameters()}}, {"params": there})
    four().run(jobs.saved, "plain", blocks(S), str(tmp_path / "e"), "per_replica", 2)
    with pytest.raises(deslo_plugin.ConfigError, match="every replica's own"):
        deslo_plugin.load_averaged_state_dict(tmp_path / "e")


def test_one_process_alone_loads_what_four_saved(four, tmp_path):
    four().run(jobs.saved, "hsdp", blocks(S), str(tmp_path / "c"), "averaged", 5)
    there = four().run(jobs.loaded, "hsdp", blocks(S), str(tmp_path / "c"))[0]["states"]
    model = torch_jobs.net(seed=9)
    optimizer = deslo_plugin.DesLoc(torch_jobs.two_groups(model), blocks(S))
    deslo_plugin.attach(model, optimizer)
    deslo_plugin.load(tmp_path / "c", model)
    same(torch_jobs.states_of(model, optimizer, ["exp_avg", "exp_avg_2", "exp_avg_sq"]), there)


def test_an_exact_checkpoint_of_other_shards_is_refused(four, tmp_path):
    four().run(jobs.saved, "hsdp", blocks(S), str(tmp_path / "c"), "per_replica", 2)
    for error in four().run(jobs.refused, "plain", blocks(S), str(tmp_path / "c")):
        assert "the 2 replica(s) of 2 rank(s) that saved it, got 4 of 1" in error and 'mode "averaged"' in error


def truncated(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-9])


def bit_flipped(folder):
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def without_a_file(folder):
    next(folder.glob("*.distcp")).unlink()


def foreign(folder):
    (folder / "deslo.json").unlink()


def of_a_later_format(folder):
    text = json.loads((folder / "deslo.json").read_text())
    (folder / "deslo.json").write_text(json.dumps(text | {"format": 99}))


@pytest.mark.parametrize(
    "harm, message",
    [
        (truncated, "distcp: other bytes than were saved"),
        (bit_flipped, "distcp: other bytes than were saved"),
        (without_a_file, "distcp: missing"),
        (foreign, "a folder with deslo.json, got none"),
        (of_a_later_format, "format 2, got 99"),
    ],
)
def test_a_harmed_checkpoint_is_named_and_refused_on_every_rank(four, tmp_path, harm, message):
    four().run(jobs.saved, "plain", blocks(S), str(tmp_path / "c"), "averaged", 2)
    harm(tmp_path / "c")
    for error in four().run(jobs.refused, "plain", blocks(S), str(tmp_path / "c")):
        assert message in error and str(tmp_path / "c") in error


def test_a_rank_killed_inside_a_save_leaves_the_one_before(four, tmp_path):
    said = four().outcomes(jobs.killed_in_a_save, blocks(S), str(tmp_path / "c"), timeout=60)
    assert "no error" not in said and "the process died" in said[2]
    assert deslo_plugin.latest_checkpoint(tmp_path) == tmp_path / "c"
    assert four().run(jobs.loaded, "plain", blocks(S), str(tmp_path / "c"))[0]["steps"] == 2
    four().run(jobs.saved, "plain", blocks(S), str(tmp_path / "c"), "averaged", 3)  # what was left is in nobody's way
    assert not (tmp_path / "c.part").exists() and deslo_plugin.latest_checkpoint(tmp_path) == tmp_path / "c"


def test_a_process_killed_anywhere_in_a_save_leaves_a_whole_checkpoint(tmp_path):
    """Every save holds one number in all tensors: whatever is loaded afterwards must be of one save."""
    for seed in range(30):
        begun, tell = STARTED.Pipe(duplex=False)
        child = STARTED.Process(target=jobs.save_on_and_on, args=(tmp_path / "c", 1000 * seed, tell), daemon=True)
        child.start()
        assert begun.poll(600)
        time.sleep(random.Random(seed).random() * 0.1)
        child.kill()
        child.join(timeout=10)
        model, optimizer = jobs.alone()
        deslo_plugin.load(tmp_path / "c", model)
        values = {
            float(each)
            for param in model.parameters()
            for each in (*param.detach().flatten(), *optimizer.state[param]["exp_avg"].flatten())
        }
        assert len(values) == 1 and values.pop() >= 1000 * seed


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(four, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RankError) as raised:
        four().run(jobs.saved, "plain", blocks(S), str(tmp_path / "file" / "c"), "averaged", 1)
    assert all("rank 0 failed" in error and "every rank can see and write to" in error for error in raised.value.errors)


@pytest.mark.parametrize("kind", ["plain", "ddp", "hsdp"])
def test_plain_ways_to_save_one_replica_are_refused(four, kind):
    for said in four().run(jobs.refused_by_torch, kind, config_for(kind)):
        for way, error in said.items():
            assert "replicas, which differ between averages" in error and "deslo_plugin.save(path, model)" in error, way


def test_other_models_and_optimizers_are_refused_by_name(four, tmp_path):
    four().run(jobs.saved, "plain", blocks(S), str(tmp_path / "c"), "averaged", 2)
    for error in four().run(jobs.refused, "plain", blocks(RULES["des-loc-sgdm"]), str(tmp_path / "c")):
        assert (
            "0.weight: expected exp_avg [8, 6], origin [], params [8, 6], step [], got exp_avg [8, 6], exp_avg_2 [8, 6]"
            in error
        )
