"""What a run writes down: every average and every total, on whatever it is tracked with, and never at training's
expense."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import deslo_plugin
from deslo_plugin import ConfigError, load_config
from deslo_plugin.kernels.drift import Drift
from deslo_plugin.telemetry.jsonl_writer import JsonlWriter, read
from deslo_plugin.telemetry.report.run import Run
from tests.support import telemetry_jobs as jobs
from tests.support.oracle import blocks
from tests.support.telemetry_lines import STEPS, S, lines, local, total


@pytest.mark.parametrize("wrap", ["plain", "ddp", "fsdp"])
def test_lines_are_what_the_meter_counted_and_the_plan_foretold(four, tmp_path, wrap):
    config = blocks(S, replica_size="auto" if wrap == "fsdp" else 1, telemetry={"path": str(tmp_path)})
    results = four().run(jobs.recorded, wrap, config, STEPS)
    ranks = [0, 2] if wrap == "fsdp" else [0, 1, 2, 3]  # the first of each replica
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"replica-{replica}.jsonl" for replica in range(len(ranks))
    ]
    for replica, rank in enumerate(ranks):
        result, path = results[rank], tmp_path / f"replica-{replica}.jsonl"
        (start,), (end,), averages = lines(path, "start"), lines(path, "end"), lines(path, "average")
        assert total(path) == result["bytes"] == result["planned"] == end["bytes"]
        assert end["exposed_s"] == result["exposed"]
        # and calls beside
        assert sum(each["exposed_s"] for each in averages) == pytest.approx(result["exposed"], abs=0.05)
        assert (start["replica"], start["replicas"], start["shard"]) == (replica, len(ranks), 0)
        assert start["groups"][1]["periods"] == {"params": 2, "exp_avg": 6, "exp_avg_2": 4, "exp_avg_sq": 12}
        assert (end["events"], end["taken"], end["skipped_steps"]) == (result["events"], STEPS, 0)
        assert [log["steps"] for log in lines(path, "log")] == list(range(1, STEPS + 1))
        for average in averages:
            assert average["distance"].keys() == average["cosine"].keys() == average["bytes"].keys()
            assert all(seconds >= average["exposed_s"] > 0 for seconds in average["in_flight_s"].values())
        last = averages[-1]
        state = next(iter(last["distance"]))
        assert (last["distance"][state], last["cosine"][state]) == result["drift"][state]
    run = Run(tmp_path)
    assert (
        run.ended
        and run.bytes == results[0]["bytes"]
        and run.tokens == 7 * STEPS * 4
        and run.steps == run.taken == STEPS
    )
    assert f"{STEPS} steps" in results[0]["summary"] and f"{run.reduction:.1f} times fewer" in results[0]["summary"]
    assert lines(tmp_path / "replica-0.jsonl", "end")[0]["reduction"] == pytest.approx(run.reduction)


def test_without_the_block_nothing_is_written(four, tmp_path):
    results = four().run(jobs.recorded, "plain", blocks(S, replica_size=1), 3)
    assert all(result["taken"] == 3 for result in results) and not list(tmp_path.iterdir())


def test_the_pseudo_gradient_of_equal_steps_has_cosine_1_and_of_opposite_steps_minus_1():
    """Two replicas from x = 1: by hand, Delta = (0.5, 0.5), then (0.25, -0.75), whose mean points down."""
    from deslo_plugin.averaging.pseudo_gradient import NAME, PseudoGradient
    from tests.support.worlds import threads

    def one(average):
        x = torch.nn.Parameter(torch.ones(3))
        found = []
        params = {"rule": "sgdm", "lr": 1.0, "betas": [0.0], "sync_every": {"params": 1, "exp_avg": None}}
        config = {"optimizer": {"params": params}, "deslo": {"average_at": "after_step"}}
        optimizer = deslo_plugin.DesLoc(
            [x], config, transport=average, on_average=lambda event: found.append(event.drift.get(NAME))
        )
        optimizer.averaging.receive = PseudoGradient(optimizer.averaging.receive, optimizer.averaging.record)
        for gradients in ((-0.5, -0.5), (-0.5, -0.5), (-0.25, 0.75)):
            x.grad = torch.full((3,), gradients[average.rank])
            optimizer.step()
        return [drift for drift in found if drift]

    for rank, (same, apart) in enumerate(threads(2, one)):
        assert same == Drift(0.0, 1.0)
        assert apart.cosine == pytest.approx(-1.0 if rank == 0 else 1.0, abs=1e-6)
        assert apart.distance == pytest.approx(2.0, abs=1e-5)


def test_the_pseudo_gradient_is_in_the_lines_and_costs_no_bytes(four, tmp_path):
    plain, more = (
        four().run(jobs.recorded, "plain", local(tmp_path / str(flag), pseudo_gradient=flag), STEPS)[0]
        for flag in (False, True)
    )
    assert plain["bytes"] == more["bytes"]
    seen = Run(tmp_path / "True").drift
    assert "pseudo_gradient" not in Run(tmp_path / "False").drift
    assert [each.steps for each in seen["pseudo_gradient"]] == [t for t in range(4, STEPS) if t % 2 == 0 or t % 3 == 0]
    assert all(-1 <= each.cosine < 1 for each in seen["pseudo_gradient"])


def test_a_run_that_goes_on_writes_what_it_does_over_again_once(four, tmp_path):
    four().run(jobs.resumed, local(tmp_path), 10, 20)
    kinds = Counter(record["kind"] for record in read(tmp_path / "replica-0.jsonl"))
    assert kinds["start"] == kinds["end"] == 2
    run = Run(tmp_path)
    assert run.processes == 2 and run.steps == 20
    flown = [(flight.state, flight.steps) for flight in run.flights]
    # of 2 param groups
    assert [steps for state, steps in flown if state == "exp_avg_2"] == [4, 4, 8, 8, 12, 12, 16, 16]
    lands = [flight.land for flight in run.flights]
    assert lands == sorted(lands)


def test_a_killed_rank_leaves_whole_lines(tmp_path):
    from tests.support.worlds import Processes

    world = Processes(2, tmp_path)
    try:
        outcomes = world.outcomes(jobs.killed, local(tmp_path / "run"), str(tmp_path / "run"), 1, timeout=600)
    finally:
        world.close()
    assert "the process died" in outcomes[1]
    text = (tmp_path / "run" / "replica-1.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n") and len(records) > 20 and records[-1]["kind"] != "end"
    run = Run(tmp_path / "run" / "replica-1.jsonl")
    assert not run.ended and run.losses[-1].loss == run.steps - 1


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind":"start","steps":1}\n{"kind":"lo')
    assert [record["steps"] for record in read(path)] == [1]
    journal = JsonlWriter(path)
    journal.write({"kind": "log", "steps": 2, "loss": float("nan"), "on": lambda: 1.5})
    journal.close()
    _, last = (json.loads(line) for line in path.read_text().splitlines())
    assert last == {"kind": "log", "steps": 2, "loss": None, "on": 1.5}


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path):
    code = """
import resource, signal, sys, time, pathlib
import deslo_plugin.telemetry.jsonl_writer as journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal.EVERY = 0.01
mine = journal.JsonlWriter(pathlib.Path(sys.argv[1]))
mine.write({"steps": 0}); time.sleep(0.3)
resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
for steps in range(1, 40):
    mine.write({"steps": steps}); time.sleep(0.01)
mine.close(); print("trained")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jsonl")],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": str(Path(deslo_plugin.__file__).parent.parent)},
    )
    assert done.stdout == "trained\n" and done.stderr.count("telemetry stops and training goes on") == 1, done.stderr
    steps = [json.loads(line)["steps"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps))) and 1 <= len(steps) < 5


def test_the_end_of_a_process_writes_the_rest_and_says_the_summary(tmp_path):
    code = """
import sys, torch, deslo_plugin
model = torch.nn.Linear(2, 1)
optimizer = deslo_plugin.DesLoc(model.parameters(), {"optimizer": {"params": {"sync_every": {"params": 2}}},
                                                     "deslo": {"telemetry": {"path": sys.argv[1]}}})
attachment = deslo_plugin.attach(model, optimizer)
for _ in range(5):
    model(torch.ones(2)).sum().backward(); optimizer.step(); attachment.log(loss=torch.tensor(1.0))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": str(Path(deslo_plugin.__file__).parent.parent)},
        check=True,
    )
    assert "deslo: 5 steps" in done.stderr and "  params: 2 times" in done.stderr
    assert [record["kind"] for record in read(tmp_path / "run" / "replica-0.jsonl")][-1] == "end"
    assert len(lines(tmp_path / "run" / "replica-0.jsonl", "log")) == 5


def test_a_folder_that_one_rank_cannot_write_to_is_an_error_on_every_rank(four, tmp_path):
    for message in four().run(jobs.refusal, local("here"), str(tmp_path), 2):
        assert message.startswith("deslo.telemetry.path: expected a folder that every replica can write to")
        assert "on rank 2" in message


def test_two_attachments_do_not_write_one_file(tmp_path):
    def make():
        model = torch.nn.Linear(2, 1)
        return model, deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), local(tmp_path)))

    _, first = make()
    with pytest.raises(ConfigError, match="is being written by another attachment"):
        make()
    first.close()
    make()[1].close()


@pytest.mark.parametrize(
    "block, expected",
    [
        ({}, "deslo.telemetry.path: expected the folder of this run, got None"),
        (
            {"path": "s3://b/run"},
            "deslo.telemetry.path: expected a folder on a disk, where files grow, got 's3://b/run'",
        ),
        ({"path": 3}, "deslo.telemetry.path: expected the folder of this run, got 3 (int)"),
        ({"path": "a", "pth": 1}, "deslo.telemetry.pth: expected a known key"),
        ({"path": "a", "tensorboard": "yes"}, "deslo.telemetry.tensorboard: expected true or false"),
        ("runs", "deslo.telemetry: expected a mapping"),
    ],
)
def test_mistakes_in_the_block_are_errors(block, expected):
    with pytest.raises(ConfigError) as error:
        load_config({"deslo": {"telemetry": block}})
    assert expected in str(error.value)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="deslo.telemetry.pseudo_gradient: expected false with a sync_delay above 1"):
        load_config({"deslo": {"sync_delay": 2, "telemetry": {"path": "a", "pseudo_gradient": True}}})


def test_what_is_no_number_is_refused_by_name(tmp_path):
    model = torch.nn.Linear(2, 1)
    attachment = deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), local(tmp_path)))
    for values, expected in (
        ({"loss": "low"}, "log(loss=...): expected a number, or a tensor with one, got 'low' (str)"),
        ({"steps": 3}, "log(steps=...): expected another name"),
        ({"loss": torch.ones(2)}, "log(loss=...): expected a number, or a tensor with one"),
    ):
        with pytest.raises(ConfigError) as error:
            attachment.log(**values)
        assert expected in str(error.value)
    attachment.close()
