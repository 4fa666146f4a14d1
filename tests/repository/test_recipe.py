"""The study of docs/results.md: one start for all methods is the run that they would have had, and the document shows
what came out."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.quality.recipe import trial
from benchmarks.quality.recipe.methods import ENDS, METHODS, NORM_CLIP
from benchmarks.quality.recipe.parts import SINGLE, TUNED, best, wanted
from benchmarks.quality.recipe.settings import SETTINGS, Setting
from benchmarks.quality.recipe.tables import tables
from benchmarks.simulation.small_gpt import GPTConfig
from deslo_plugin.simulation import simulate

ROOT = Path(__file__).resolve().parents[2]
FOUND = json.loads((ROOT / "benchmarks" / "results" / "recipe.json").read_text())
RUNS = FOUND["runs"]
TEXT = (ROOT / "docs" / "results.md").read_text()
TINY = replace(
    Setting(), shape=GPTConfig(dim=16, layers=1, heads=2, context=16), warm_up=4, switch=16, decay=112, steps=128
)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(SETTINGS, "tiny", TINY)
    monkeypatch.setattr(trial, "STARTS", tmp_path)


@pytest.mark.parametrize("name", ["Local ADOPT", "MT-DAO, rate x 2", "DiLoCo, outer 0.7 / 0.6"])
def test_from_the_common_start_a_method_goes_on_as_if_it_had_trained_alone(name):
    found = trial.train("tiny", name, 1e-2, 0)
    objective, config = TINY.objective(0), METHODS[name].config(1e-2, TINY.switch)
    for moment in simulate(objective, config, replicas=4, steps=TINY.decay, rate=TINY.rate, norm_clip=NORM_CLIP):
        world = moment.replicas
    assert found[trial.CONSTANT] == pytest.approx(float(objective.evaluate(trial.served(world))), abs=2e-3)


def test_every_end_of_the_rate_is_told_and_is_another():
    found = trial.train("tiny", "MT-DAO", 1e-2, 0, ends=True)
    ends = [found[f"decayed, {end}"] for end in ENDS] + [found[trial.DECAYED]]
    assert all(end < found[trial.CONSTANT] for end in ends) and len(set(ends)) > 4


def test_what_wins_on_the_first_seed_is_wanted_on_the_others():
    grid = [
        {"setting": "68k", "method": "MT-DAO", "lr": lr, "seed": 0, **dict.fromkeys(trial.MOMENTS, abs(lr - 5e-3))}
        for lr in SETTINGS["68k"].rates
    ]
    assert set(best(grid, "68k", "MT-DAO").values()) == {5e-3}
    assert best(grid[1:], "68k", "MT-DAO") == {}
    assert ("68k", "MT-DAO", 5e-3, 2, False) in list(wanted(grid, ["68k"]))


def test_the_document_is_of_the_whole_study_in_its_present_settings():
    assert not list(wanted(RUNS, [*TUNED, *SINGLE]))
    present = {name: asdict(setting) for name, setting in SETTINGS.items() if name != "tiny"}
    assert json.loads(json.dumps(present)) == FOUND["settings"]


@pytest.mark.parametrize("title", tables(RUNS))
def test_every_table_is_shown_as_it_came_out(title):
    assert tables(RUNS)[title] in TEXT
