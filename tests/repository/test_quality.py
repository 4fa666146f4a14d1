"""The study of docs/results-without-switch.md: every method trains, finished runs are not repeated, and the document
shows what came out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import clock, extrapolate, plots, study
from benchmarks.quality.findings import tables
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.methods import LOCAL, METHODS, PRESETS, run, tuning
from benchmarks.quality.trial import train
from benchmarks.simulation.small_gpt import GPTConfig, small_gpt

ROOT = Path(__file__).resolve().parents[2]

GUESS = 5.545  # nats: one of 256 bytes
SHORT = PRESETS["short"]
STUDIES = ("short", "long")
TINY = {
    "shape": GPTConfig(dim=16, layers=1, heads=2, context=16),
    "sequences": 2,
    "steps": 32,
    "warm_up": 8,
    "look": 16,
    "period": 4,
    "held_out": 1,
}
SMALL = replace(SHORT, **TINY)
TEXT = (ROOT / "docs" / "results-without-switch.md").read_text()

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_tells_its_bytes(name):
    each = run(SMALL, name, rate=6e-3, seed=0, warm_up=True)
    result = train(each, SMALL)
    assert result["steps"] == [16, 32] and result["validation"][1] < result["validation"][0] < GUESS
    gradients = 32 * 4 * small_gpt(SMALL.shape, sequences=1, replicas=1, seed=0).start.numel()
    if name in LOCAL:
        assert result["bytes"] < gradients and 0 < result["progress"] <= 1 and 0 < result["momentum"] <= 1
    else:
        assert result["bytes"] == gradients and result["progress"] is None


def test_the_gpu_preset_computes_in_bfloat16_and_learns_as_in_float32():
    preset = replace(PRESETS["gpu"], **TINY, device="cpu")
    each = run(preset, "MT-DAO, ADOPT", rate=2e-2, seed=0, warm_up=True)
    rough, exact = (train(each, replace(preset, bfloat16=bfloat16))["validation"] for bfloat16 in (True, False))
    assert rough[1] < rough[0] and rough != exact
    assert rough == pytest.approx(exact, abs=0.02)


def test_late_averages_without_compensation_are_another_run():
    late = [
        run(SMALL, "DES-LOC", rate=6e-3, seed=0, warm_up=False, deslo={"sync_delay": 4}, compensated=each)
        for each in (True, False)
    ]
    with_it, without = (train(each, SMALL)["validation"] for each in late)
    assert with_it != without and max(with_it + without) < GUESS


def test_parts_of_the_corpus_of_their_own_are_other_batches():
    shared, own = (run(SMALL, "DES-LOC", rate=6e-3, seed=0, warm_up=False, shards=each) for each in (False, True))
    assert train(shared, SMALL)["validation"] != train(own, SMALL)["validation"]


def test_finished_runs_are_not_repeated(tmp_path):
    runs = [run(SMALL, "DES-LOC", rate=rate, seed=0, warm_up=False) for rate in (1e-3, 2e-3)]
    assert study.finish(runs[:1], SMALL, Ledger(tmp_path / "runs.json", SMALL)) == 1
    again = Ledger(tmp_path / "runs.json", SMALL)
    before = dict(again.runs)
    assert study.finish(runs, SMALL, again) == 1
    assert study.finish(runs, SMALL, Ledger(tmp_path / "runs.json", SMALL)) == 0
    assert again.runs[runs[0].key] == before[runs[0].key] and set(again.runs) == {each.key for each in runs}


def test_runs_of_another_size_have_another_file(tmp_path):
    Ledger(tmp_path / "runs.json", SMALL).write(
        run(SMALL, "DES-LOC", rate=1e-3, seed=0, warm_up=False), {"validation": [1.0]}
    )
    with pytest.raises(ValueError, match="expected runs of the same steps, got others"):
        Ledger(tmp_path / "runs.json", replace(SMALL, steps=64))


def test_every_method_has_the_same_grid_of_rates_and_a_start_of_each_kind():
    grids = tuning(SHORT)
    assert {tuple(grid) for grid in grids.values()} == {SHORT.rates}
    assert set(grids) == {(name, False) for name in METHODS} | {(name, True) for name in LOCAL}


@pytest.mark.parametrize("name", STUDIES)
def test_the_document_is_of_the_whole_study(name):
    finished = Ledger(study.results(name), PRESETS[name])
    missing = [
        each for part in study.PARTS for each in study.wanted(part, PRESETS[name], finished) if each not in finished
    ]
    assert not missing


@pytest.mark.parametrize("name", STUDIES)
def test_every_table_and_figure_is_shown_as_it_came_out(name):
    for title, table in tables(PRESETS[name], Ledger(study.results(name), PRESETS[name])).items():
        assert table in TEXT, title
    for kind in plots.FIGURES:
        file = plots.file(name, kind)
        assert f"](figures/{file})" in TEXT and (ROOT / "docs" / "figures" / file).is_file()


def test_no_average_travels_while_the_clock_stands():
    long = PRESETS["long"]
    *looks, end = clock.looks(long)
    assert end == long.steps and len(looks) > 10
    assert all(look % long.period == long.period // 2 for look in looks)


def test_a_target_is_reached_between_looks_or_never():
    curve = {"steps": [10, 20, 30], "seconds": [1.0, 3.0, 4.0], "losses": [4.0, 3.0, 2.0]}
    assert clock.reached(2.5, curve) == (25.0, 3.5)
    assert clock.reached(1.9, curve) is None


def test_processes_on_two_nodes_train_as_the_simulated_replicas():
    """The same data, start and rates: what is left between them is how float32 sums are ordered, over 3,072 steps."""
    rates, finished = json.loads(clock.RESULTS.read_text())["rates"], Ledger(study.results("long"), PRESETS["long"])
    for title, (how, trained) in clock.entrants(PRESETS["long"], finished).items():
        if title in LOCAL or how == "ddp":
            ends = [curves[title]["losses"][-1] for curves in rates.values()]
            assert ends == pytest.approx([finished.final(trained)] * len(ends), abs=0.02), title


def test_the_document_shows_the_clock_and_the_planners_hours():
    tables = [*clock.tables(json.loads(clock.RESULTS.read_text())), extrapolate.markdown()]
    assert all(table in TEXT for table in tables)
    assert "](figures/clock.png)" in TEXT and (ROOT / "docs" / "figures" / "clock.png").is_file()
