"""Where a run's telemetry goes beside its own files: monitors, trackers, TensorBoard, the profiler."""

import csv
import sys
from collections import defaultdict

import pytest
import torch

import deslo_plugin
from deslo_plugin import ConfigError
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.kernels.drift import Drift
from deslo_plugin.telemetry.recorder import Recorder
from tests.support import telemetry_jobs as jobs
from tests.support.engine_configs import ds_config
from tests.support.telemetry_lines import STEPS, S, local, total


@pytest.mark.parametrize("stage, optimizer", [(0, "DesLoc"), (1, "DesLoc"), (3, "DesLoc"), (1, "AdamW")])
def test_deepspeeds_monitor_gets_one_row_for_each_average(four, tmp_path, stage, optimizer):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    ds = ds_config(S, stage, csv_monitor=monitor, deslo={"telemetry": {"path": str(tmp_path / "run")}})
    if optimizer == "AdamW":
        ds["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
        ds["deslo"] = {
            "replica_size": 2,
            "telemetry": {"path": str(tmp_path / "run")},
            "sync_every": {"params": 3, "exp_avg": 6, "exp_avg_sq": 12},
        }
    first, *_ = four().run(jobs.engine_recorded, ds, STEPS)
    table = defaultdict(list)
    for path in (tmp_path / "job").glob("deslo_*.csv"):
        with path.open() as file:
            table[path.stem] = [(int(samples), float(value)) for samples, value in list(csv.reader(file))[1:]]
    assert first["bytes"] == first["planned"] == total(tmp_path / "run" / "replica-0.jsonl")
    for state, count in first["bytes"].items():
        rows = table[f"deslo_bytes_{state}"]
        assert rows[-1][1] == count and len(rows) == first["events"][state]
        assert [samples for samples, _ in rows] == sorted({samples for samples, _ in rows})
        assert all(samples % first["samples"] == 0 for samples, _ in rows)
        assert len(table[f"deslo_cosine_{state}"]) == len(table[f"deslo_distance_{state}"]) == len(rows)
    assert table["deslo_exposed_s_all"][-1][1] == pytest.approx(first["exposed"], abs=0.05)


def test_accelerates_trackers_get_the_scalars_of_the_first_rank(four, tmp_path):
    told, *others = four().run(jobs.tracked, local(tmp_path), STEPS)
    assert all(other == [] for other in others)
    assert [steps for _, steps in told] == [t for t in range(2, STEPS) if any(t % period == 0 for period in (2, 3))]
    assert told[-1][0]["deslo_bytes/params"] == total(tmp_path / "replica-0.jsonl")["params"]
    assert all(values["deslo_distance/params"] > 0 and abs(values["deslo_cosine/params"]) <= 1 for values, _ in told)


def test_a_tracker_that_raises_is_dropped_and_the_others_go_on(caplog):
    class Averaging:
        listeners, stats, steps = [], deslo_plugin.optim.desloc.Meter(), 0

    seen, recorder = [], Recorder(Averaging)
    recorder.add_sink(lambda scalars, steps: 1 / 0)
    recorder.add_sink(lambda scalars, steps: seen.append((steps, scalars["deslo_cosine/params"])))
    for steps, cosines in ((2, (0.5, 0.25)), (4, (0.75,))):
        for cosine in cosines:  # of two param groups, the worst
            Averaging.listeners[0](
                SyncEvent(steps, {"params": 4}, 0.1, {"params": Drift(0.1, cosine)}, {"params": 0.2})
            )
    recorder.step_ended()
    assert seen == [(2, 0.25), (4, 0.75)]
    assert caplog.text.count("no more scalars") == 1


def test_tensorboard_is_asked_for_by_name_and_written(tmp_path, monkeypatch):
    import types

    def attach(path):
        model = torch.nn.Linear(2, 1)
        config = {
            "optimizer": {"params": {"sync_every": {"params": 2}}},
            "deslo": {"telemetry": {"path": str(path), "tensorboard": True}},
        }
        return model, deslo_plugin.attach(model, deslo_plugin.DesLoc(model.parameters(), config))

    import deslo_plugin.frameworks.telemetry_sinks as wiring

    monkeypatch.setattr(wiring, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="deslo.telemetry.tensorboard: expected the package tensorboard, got none"):
        attach(tmp_path / "a")

    class Writer:
        def __init__(self, folder):
            self.folder, self.rows = folder, rows

        def add_scalar(self, name, value, steps):
            rows.append((name, value, steps))

        def close(self):
            pass

    rows = []
    monkeypatch.setattr(wiring, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    model, attachment = attach(tmp_path / "b")
    for _ in range(5):
        model(torch.ones(2)).sum().backward()
        attachment.optimizer.step()
    attachment.close()
    assert [(value, steps) for name, value, steps in rows if name == "deslo_bytes/params"] == [(16, 2), (32, 4)]


def test_the_profiler_shows_launch_wait_and_land():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = deslo_plugin.DesLoc([x], sync_every={"params": 1})
    with torch.profiler.profile() as profile:
        for _ in range(2):
            x.grad = torch.ones(3)
            optimizer.step()
    names = {event.key for event in profile.key_averages()}
    assert {"deslo::launch", "deslo::wait", "deslo::land"} <= names
