"""docs/robustness.md shows what benchmarks/results hold."""

import json
from pathlib import Path

import pytest

from benchmarks.simulation import curves, robustness, toy

ROOT = Path(__file__).resolve().parents[2]

TEXT = (ROOT / "docs" / "robustness.md").read_text()
EXPERIMENTS = json.loads(robustness.RESULTS.read_text())["experiments"]
SCENES = json.loads(toy.RESULTS.read_text())["f"]


@pytest.mark.parametrize("title", EXPERIMENTS)
def test_an_experiment_is_shown_as_it_came_out(title):
    assert robustness.table(title, EXPERIMENTS[title]) in TEXT
    assert (
        f"](figures/{curves.file_name(title)})" in TEXT
        and (ROOT / "docs" / "figures" / curves.file_name(title)).is_file()
    )


@pytest.mark.parametrize("scene", SCENES)
def test_the_toy_problem_is_shown_as_it_came_out(scene):
    assert toy.table(scene, SCENES[scene]) in TEXT


def test_results_are_of_the_experiments_that_the_benchmark_runs():
    assert {title: set(runs) for title, runs in EXPERIMENTS.items()} == {
        title: set(runs) for title, runs in robustness.EXPERIMENTS.items()
    }
    assert all(len(each["curves"]) == len(robustness.SEEDS) for runs in EXPERIMENTS.values() for each in runs.values())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_run_of_the_benchmark_learns_and_sees_who_joined():
    scene = robustness.Scene(replicas=1, capacity=2, steps=16, growth=8)
    out = robustness.train(robustness.Run("des-loc-adam", scene), seed=0)
    assert out["steps"] == [8, 16] and out["replicas"] == [1, 2]
    assert out["held_out"][1] < out["held_out"][0] < 5.6  # nats; 5.545 is a guess among 256 bytes
