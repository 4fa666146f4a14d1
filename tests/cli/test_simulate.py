"""``deslo simulate``: what it prints, draws and writes, what befalls replicas, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deslo_plugin import ConfigError, load_config
from deslo_plugin.cli.app import app
from deslo_plugin.simulation import Failures, Growth, Replicas
from deslo_plugin.simulation import simulate as moments_of
from deslo_plugin.simulation.byte_lm import language, read_text, standard_library
from deslo_plugin.simulation.comparison import read_contestants
from deslo_plugin.simulation.settings import OPTIONS, SimulationConfig, read_spectrum

ROOT = Path(__file__).resolve().parents[2]
TOY = [str(ROOT / "configs" / "toy" / f"{name}.json") for name in ("des-loc", "local-adam", "favg+opt", "favg-opt")]
ADAM = load_config({"optimizer": {"params": {"lr": 0.01, "sync_every": {"params": 4}}}})
FAVG = load_config({"optimizer": {"params": {"sync_every": {"params": 4, "exp_avg": None, "exp_avg_sq": None}}}})
SMALL = ["--replicas", "4", "--steps", "40"]


def run(*arguments: str, status: int = 0):
    result = CliRunner().invoke(app, ["simulate", *arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def answer(*arguments: str) -> dict:
    return json.loads(run(*arguments, "--json", "-").stdout)


def losses(found: dict, name: str) -> list[list[float]]:
    return [curve["losses"] for curve in found["algorithms"][name]["curves"]]


@pytest.mark.parametrize("objective", OPTIONS)
def test_every_objective_is_learned_by_every_default_algorithm(objective):
    steps = "40" if objective == "bytes" else "120"
    found = answer("--objective", objective, "--replicas", "4", "--steps", steps, "--lr", "0.02")
    assert list(found["algorithms"]) == ["des-loc-adam", "local-adam", "favg+opt"]
    for name in found["algorithms"]:
        (curve,) = losses(found, name)
        assert curve[-1] < 0.95 * curve[0]


def test_the_same_seed_gives_the_same_curves_and_another_others():
    first, again, other = (
        losses(answer(*SMALL, "--seed", seed, "--config", TOY[0]), "des-loc") for seed in ("3", "3", "4")
    )
    assert first == again != other


def test_the_toy_figure_of_des_loc():
    """arXiv 2505.22549, Fig. 2, with a quarter of its replicas, half of its steps: docs/simulate.md has the whole."""
    options = [each for path in (TOY[0], TOY[1], TOY[3]) for each in ("--config", path)]
    found = answer("--replicas", "64", "--steps", "3360", *options)
    ends = {name: sum(curve[-48:]) / 48 for name in found["algorithms"] for curve in losses(found, name)}
    assert ends["local-adam"] == pytest.approx(ends["des-loc"], rel=0.25)  # they converge together
    assert ends["favg-opt"] > 10 * ends["des-loc"]  # stalls


def test_results_are_told_drawn_and_written(tmp_path):
    plot, content = tmp_path / "losses.png", tmp_path / "losses.json"
    out = run(
        *SMALL,
        "--config",
        TOY[0],
        "--synchronous",
        "--seed",
        "0",
        "--seed",
        "1",
        "--double-at",
        "20",
        "--plot",
        str(plot),
        "--json",
        str(content),
    ).stdout
    for told in ("des-loc", "synchronous", "half-life", "exp_avg_sq", "over seeds"):
        assert told in out
    assert plot.read_bytes()[:4] == b"\x89PNG"
    found = json.loads(content.read_text())
    assert (
        found["scene"]["double_at"] == 20
        and found["algorithms"]["des-loc"]["optimizer"]["periods"]["exp_avg_sq"] == 692
    )
    for each in found["algorithms"].values():
        assert [curve["seed"] for curve in each["curves"]] == [0, 1]
        assert {
            (step > 20, count) for curve in each["curves"] for step, count in zip(curve["steps"], curve["replicas"])
        } == {(False, 4), (True, 8)}
    assert {name: len(each["memory"]) for name, each in found["algorithms"].items()} == {"des-loc": 2, "synchronous": 0}
    sent = {name: each["curves"][0]["bytes"] for name, each in found["algorithms"].items()}
    assert sent == {"des-loc": 0, "synchronous": 40 * 2 * 4}  # no period has passed; two float32 gradients at each step


def test_one_that_diverges_is_named_and_the_others_go_on(tmp_path):
    wild = tmp_path / "wild.json"
    wild.write_text(json.dumps({"optimizer": {"params": {"rule": "sgdm", "lr": 1e3, "sync_every": {"params": 4}}}}))
    options = [
        *SMALL,
        "--objective",
        "quadratic",
        "--config",
        str(wild),
        "--config",
        TOY[0],
        "--plot",
        str(tmp_path / "p.svg"),
    ]
    found = answer(*options)
    assert (
        found["algorithms"]["wild"]["curves"][0]["diverged"]
        and not found["algorithms"]["des-loc"]["curves"][0]["diverged"]
    )
    assert "diverged" in run(*options).stdout and "wild (diverged)" in (tmp_path / "p.svg").read_text()


def test_sgdm_is_told_what_is_proven_of_it():
    out = run(
        *SMALL, "--objective", "quadratic", "--lr", "0.1", "--config", str(ROOT / "configs" / "des-loc-sgdm.json")
    ).stdout
    assert "des-loc-sgdm: psi" in out and "/ L" in out


def test_gradient_clipping_of_the_file_bounds_each_replica(tmp_path):
    blocks = {"optimizer": {"params": {"rule": "sgdm", "lr": 1.0, "betas": [0.0], "sync_every": {"params": 100}}}}
    ends = []
    for name, extra in (("free", {}), ("clipped", {"gradient_clipping": 0.001})):
        (tmp_path / f"{name}.json").write_text(json.dumps(blocks | extra))
        found = answer(
            "--replicas",
            "1",
            "--steps",
            "1",
            "--objective",
            "quadratic",
            "--sigma",
            "0",
            "--spectrum",
            "1",
            "--config",
            str(tmp_path / f"{name}.json"),
        )
        ends.append(losses(found, name)[0][-1])
    assert ends == pytest.approx([0.0, 0.5 * 0.999**2], abs=1e-5)  # a step of 1, and one of 0.001, from 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fail-every", "0"], "--fail-every: expected a whole number >= 1, got 0"),
        (["--fail-every", "5", "--fail-share", "1"], "--fail-share: expected a number between 0 and 1, got 1"),
        (["--fail-every", "5", "--fail-absent", "0"], "--fail-absent: expected a whole number >= 1, got 0"),
        (["--fail-every", "5", "--replicas", "1"], "--fail-every: expected two replicas or more, got 1"),
        (["--fail-share", "0.1"], "--fail-share: expected --fail-every beside it, got none"),
        (["--double-at", "0"], "--double-at: expected a whole number >= 1, got 0"),
        (["--double-at", "1000"], "--double-at: expected fewer than the 1000 steps, got 1000"),
        (["--replicas", "0"], "--replicas: expected a whole number >= 1, got 0"),
        (["--steps", "0"], "--steps: expected a whole number >= 1, got 0"),
        (["--objective", "rosenbrok"], "did you mean 'rosenbrock'?"),
        (["--sigma", "-1"], "--sigma: expected a number >= 0, got -1"),
        (["--sigma", "nan"], "--sigma: expected a number >= 0, got nan"),
        (
            ["--objective", "bytes", "--sigma", "1"],
            "--sigma: expected none: it belongs to rosenbrock and quadratic, got 1.0",
        ),
        (["--spectrum", "1"], "--spectrum: expected none: it belongs to quadratic and logistic, got 1"),
        (["--data", "x"], "--data: expected none: it belongs to bytes, got x"),
        (["--sigma", "1", "--noniid", "3"], "--sigma: expected none beside --noniid"),
        (["--objective", "bytes", "--noniid", "1.5"], "--noniid: expected a share in [0, 1]"),
        (["--objective", "bytes", "--data", "nowhere.txt"], "--data: expected a file of text"),
        (["--objective", "quadratic", "--spectrum", "1:x"], "--spectrum: expected numbers > 0"),
        (["--objective", "quadratic", "--spectrum", "0,1"], "--spectrum: expected numbers > 0"),
        (["--config", "des-loc-adm"], "did you mean 'des-loc-adam'?"),
        (["--config", TOY[0], "--config", TOY[0]], "configs of different names, got des-loc twice"),
        (["--lr", "-1"], "--lr: expected a number >= 0, got -1"),
        (["--seed", "1", "--seed", "1"], "--seed: expected different whole numbers"),
        (["--plot", "losses.txt"], "--plot: expected a file that ends in one of .png"),
        (["--plot", "nowhere/losses.png"], "--plot: expected an existing folder"),
        (["--device", "abacus"], "--device: expected one of this machine"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence_and_status_2(arguments, message):
    assert message in run(*arguments, status=2).stderr


def test_a_config_that_cannot_be_simulated_is_refused(tmp_path):
    path = tmp_path / "one.json"
    for blocks, message in (
        ({"deslo": {"sync_every": {"params": 4}}}, "a stock optimizer"),
        ({"optimizer": {"params": {}}, "gradient_clipping": "auto"}, "gradient_clipping"),
        ({"optimizer": {"params": {}}, "deslo": {"replica_weights": "samples"}}, "deslo.replica_weights"),
    ):
        path.write_text(json.dumps(blocks))
        assert message in run(*SMALL, "--config", str(path), status=2).stderr


def test_failures_and_growth_refuse_what_has_no_meaning():
    for wrong in (
        lambda: Failures(every=0, share=0.1, absent=1),
        lambda: Failures(every=1, share=0.0, absent=1),
        lambda: Failures(every=1, share=1.0, absent=1),
        lambda: Failures(every=1, share=0.1, absent=0),
        lambda: Growth(at=0, count=1),
        lambda: Growth(at=1, count=0),
    ):
        with pytest.raises(ConfigError, match="expected"):
            wrong()


def populations(scene: SimulationConfig, config=ADAM) -> list[set[int]]:
    goal = scene.build(0)
    return [
        set(moment.replicas.ids)
        for moment in moments_of(
            goal, config, replicas=scene.replicas, steps=scene.steps, membership=scene.membership(config, 0)
        )
    ]


def test_somebody_always_stays():
    there = populations(SimulationConfig(replicas=3, steps=40, fail_every=2, fail_share=0.9, fail_absent=30))
    assert min(map(len, there)) == 1


def test_replicas_double_and_fail_in_one_run():
    there = populations(SimulationConfig(replicas=4, steps=40, double_at=10, fail_every=16, fail_share=0.25))
    assert [len(there[steps - 1]) for steps in (10, 11, 17, 32, 33)] == [4, 8, 6, 6, 6]
    assert set().union(*there) == set(range(8))


@pytest.mark.parametrize("config, momenta", [(ADAM, True), (FAVG, False)])
def test_who_joins_receives_momenta_where_they_are_ever_averaged(config, momenta):
    world = Replicas(torch.zeros(3), config, 2)
    world.step(torch.ones(2, 3))
    SimulationConfig(replicas=2, steps=5, double_at=1).membership(config, 0)(1, world)
    assert len(world.ids) == 4 and bool(world.state("exp_avg")[-1].any()) == momenta


def test_a_spectrum_is_a_list_or_a_logarithmic_range():
    assert read_spectrum("1,0.5").tolist() == [1.0, 0.5]
    assert read_spectrum("0.01:1:3").tolist() == pytest.approx([0.01, 0.1, 1.0])


def test_replicas_that_differ():
    alike, apart = (SimulationConfig(objective="quadratic", noniid=noniid, sigma=0.0).build(0) for noniid in (0.0, 2.0))
    assert not alike.centres.any() and apart.centres.std() == pytest.approx(2.0, rel=0.1)
    deviations = SimulationConfig(replicas=4000, noniid=3.0).build(0).sigma
    assert deviations.min() >= 0 and deviations.square().mean().sqrt() == pytest.approx(3.0, rel=0.05)


def test_each_replica_reads_its_own_part_of_the_text_if_asked():
    text = torch.arange(20 << 14).div(19 << 12, rounding_mode="floor").byte()  # 0s, 1s, 2s and 3s, and a block held out
    goal = language(text, replicas=4, heterogeneity=1.0)
    for replica in range(4):
        tokens, targets = goal._batches([replica], 5)
        assert tokens.unique().tolist() == targets.unique().tolist() == [replica]
    tokens, targets = language(text, replicas=4)._batches(range(4), 5)
    assert tokens.shape == targets.shape == (4, 4, 32) and torch.equal(tokens[..., 1:], targets[..., :-1])


def test_a_text_must_have_windows_for_everyone():
    with pytest.raises(ConfigError, match="--data: expected a text of more than 32 bytes for each of 20000 replicas"):
        language(torch.zeros(20 << 14, dtype=torch.uint8), replicas=20000)


def test_the_held_out_text_is_never_trained_on():
    blocks = torch.zeros(20, 1 << 14, dtype=torch.uint8)
    blocks[19] = 7
    goal = language(blocks.flatten(), replicas=2)
    assert not any(each.any() for step in range(20) for each in goal._batches([0, 1], step))
    assert all(bool((each == 7).all()) for each in goal._held_out[0])


def test_the_language_model_starts_at_a_guess_and_cannot_see_ahead():
    goal = language(read_text(standard_library()), replicas=1)
    assert float(goal.evaluate(goal.start[None])) == pytest.approx(5.545, abs=0.1)  # ln 256
    tokens, targets = (each[:1].clone() for each in goal._held_out[0])
    model, last = goal._model, tokens.clone()
    last[0, -1] ^= 1
    ahead = torch.full_like(targets, -100)  # positions that the loss leaves out
    ahead[0, 10] = targets[0, 10]
    assert torch.equal(model(tokens, ahead), model(last, ahead))


def test_synchronous_training_is_the_first_config_with_gradients_averaged():
    first, added = read_contestants(TOY[:1], synchronous_steps=7)
    assert added.name == "synchronous" and added.config.deslo.synchronous_steps == 7
    assert replace(added.config, deslo=first.config.deslo) == first.config
