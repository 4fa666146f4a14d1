"""``optimizer.params.switch``: what it means, what every mistake is told, and where it is seen."""

import json

import pytest
import torch

import deslo_plugin
from deslo_plugin import ConfigError, load_config
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.planning.plan import make_plan
from deslo_plugin.simulation import Quadratic, simulate
from deslo_plugin.telemetry.report.run import Run
from tests.support.command_line import answer, run

SLOW = {"betas": [0.999], "weights": [0.95], "lr_factor": 2.0}
TWO = [{"beta": 0.9, "weight": 1.0}, {"beta": 0.999, "weight": 0.0}]


def config_of(switch, deslo=None, **params):
    blocks = {"optimizer": {"params": params | {"switch": switch}}, "deslo": {"synchronous_steps": 100} | (deslo or {})}
    return load_config(blocks)


def test_by_default_it_is_at_the_end_of_the_warm_up_and_resets_the_momenta_that_change():
    switch = config_of(SLOW).switch
    assert (switch.at, switch.betas, switch.weights, switch.reset) == (100, (0.999,), (0.95,), ("exp_avg",))
    two = config_of({"weights": [0.05, 0.95]}, momenta=TWO).switch
    assert (two.betas, two.reset, two.lr_factor) == ((0.9, 0.999), ("exp_avg", "exp_avg_2"), 1.0)
    assert config_of({"betas": [0.9, 0.99], "reset": []}, momenta=TWO).switch.reset == ()
    assert config_of({"weights": [1.0, 0.0], "betas": [0.9, 0.99]}, momenta=TWO).switch.reset == ("exp_avg_2",)
    assert config_of(SLOW | {"at": 150}).switch.at == config_of(SLOW | {"at": 150}, {"synchronous_steps": 0}).switch.at


def test_what_is_computed_is_asked_by_the_step():
    optimizer = config_of(SLOW, betas=[0.9, 0.95], sync_every={"params": 8, "exp_avg": "half_life"}).optimizer
    assert optimizer.at(99).constants["betas"] == (0.9,) and optimizer.at(99).lr_factor == 1.0
    after = optimizer.at(100)
    assert (after.constants["betas"], after.constants["weights"], after.lr_factor) == ((0.999,), (0.95,), 2.0)
    assert optimizer.periods["exp_avg"] == 693 and optimizer.period_sources["exp_avg"] == "half-life of 0.999"


@pytest.mark.parametrize(
    ("switch", "params", "expected"),
    [
        (
            {**SLOW, "at": 99},
            {},
            "switch.at: expected at least 100, where deslo.synchronous_steps ends, got 99; raise it",
        ),
        ({**SLOW, "at": 0}, {}, "switch.at: expected a whole number >= 1"),
        (
            {"weights": [0.05, 0.95]},
            {},
            "one for each first momentum (exp_avg), got [0.05, 0.95] (list); declare as many",
        ),
        ({"betas": [0.999, 0.95]}, {}, "expected a list of 1 number"),
        ({"weights": [0.7, 0.7]}, {"momenta": TWO}, "weights that sum to at most 1, got 1.4"),
        ({"betas": [1.0]}, {}, "switch.betas.0: expected a number >= 0 and < 1, got 1.0"),
        ({**SLOW, "reset": ["exp_avg_2"]}, {}, "of exp_avg, got 'exp_avg_2'; did you mean 'exp_avg'?"),
        ({**SLOW, "reset": ["exp_avg_sq"]}, {}, "got 'exp_avg_sq'; the second moment is kept; remove it"),
        ({**SLOW, "reset": ["exp_avg_sq"]}, {"rule": "sgdm", "betas": [0.9]}, "a list of first momenta, of exp_avg"),
        ({**SLOW, "reset": "exp_avg"}, {}, "got 'exp_avg' (str); write a list"),
        ({**SLOW, "lr_factor": 0}, {}, "lr_factor: expected a number > 0"),
        ({**SLOW, "momenta": []}, {}, "switch.momenta: expected a known key (at, betas, lr_factor, reset, weights)"),
        ({"betas": [0.9], "lr_factor": 1.0}, {}, "switch: expected another beta or weight than before it"),
        ({}, {}, "got none of them; say what changes, or remove it"),
        (7, {}, "optimizer.params.switch: expected a mapping"),
    ],
    ids=str,
)
def test_mistakes_in_the_switch(switch, params, expected):
    with pytest.raises(ConfigError) as error:
        config_of(switch, **params)
    assert expected in str(error.value)


def test_a_switch_without_a_step_or_beside_a_stock_optimizer_is_refused():
    with pytest.raises(ConfigError, match="a step, where no synchronous warm-up ends, got none; give it"):
        config_of(SLOW, {"synchronous_steps": 0})
    stock = {"optimizer": {"type": "AdamW", "params": {"switch": SLOW}}, "deslo": {"sync_every": {"params": 4}}}
    with pytest.raises(ConfigError, match='none but with "type": "DesLoc", got one with .AdamW.'):
        load_config(stock)
    with pytest.raises(ConfigError, match="param group 0.switch: expected none: one switch is made for all"):
        deslo_plugin.DesLoc([{"params": [torch.nn.Parameter(torch.ones(2))], "switch": SLOW}], lr=0.1)


def test_a_switch_after_the_end_is_refused_where_the_end_is_known(tmp_path):
    file = tmp_path / "late.json"
    file.write_text(json.dumps({"optimizer": {"params": {"switch": SLOW}}, "deslo": {"synchronous_steps": 50}}))
    with pytest.raises(ConfigError, match="fewer than 50, the steps of the run .--steps., got 50; lower it"):
        next(simulate(Quadratic(torch.ones(3), torch.ones(3), 0.1, replicas=2, seed=0), file, replicas=2, steps=50))
    given = ["--config", str(file), "--replicas", "2", "--replica-size", "1", "--gbps", "1", "--params", "1M"]
    done = run("plan", *given, "--step-ms", "10", "--steps", "40", status=2)
    assert "fewer than 40, the steps of the run" in done.output.replace("\n", " ")


def test_banner_and_plan_say_it(tmp_path):
    config = config_of(SLOW, betas=[0.9, 0.9985])
    said = make_plan(config, [1000], [config.optimizer.periods], contiguous(4, 0, 2)).describe()
    assert "direction 1 u(0.9)" in said
    assert (
        "switch after step 100: adam, direction 0.95 u(0.999) + 0.05 g; betas 0.999, weights 0.95, lr x 2; exp_avg "
        "reset to 0" in said
    )
    low = config_of(SLOW, betas=[0.9, 0.95])
    said = make_plan(low, [1000], [low.optimizer.periods], contiguous(4, 0, 2)).describe()
    assert "beware: beta 0.999 outlives beta2 0.95" in said
    file = tmp_path / "switch.json"
    file.write_text(json.dumps({"optimizer": {"params": {"switch": SLOW}}, "deslo": {"synchronous_steps": 100}}))
    given = ["plan", "--config", str(file), "--replicas", "2", "--replica-size", "1", "--gbps", "1", "--params", "1M"]
    plan = answer(*given, "--step-ms", "10", "--steps", "1000")
    assert plan["switch"] == {"at": 100, "betas": [0.999], "weights": [0.95], "lr_factor": 2.0, "reset": ["exp_avg"]}
    assert plan["states"][1]["half_life"] == pytest.approx(692.8, abs=0.1)
    assert "Switch after step 100 betas 0.999" in run(*given, "--step-ms", "10").stdout


def test_telemetry_has_a_line_of_it_and_the_report_its_step(tmp_path):
    model = torch.nn.Linear(2, 1)
    deslo = {"synchronous_steps": 3, "telemetry": {"path": str(tmp_path)}}
    optimizer = deslo_plugin.DesLoc(
        [{"params": [model.weight]}, {"params": [model.bias]}],
        {"optimizer": {"params": {"switch": SLOW, "sync_every": {"params": 2}}}, "deslo": deslo},
    )
    attachment = deslo_plugin.attach(model, optimizer)
    for _ in range(5):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        attachment.log(loss=1.0)
    attachment.close()
    lines = [json.loads(line) for line in (tmp_path / "replica-0.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["kind"] == "switch")
    assert {name: line[name] for name in ("steps", "betas", "weights", "lr_factor", "reset")} == {
        "steps": 3,
        "betas": [0.999],
        "weights": [0.95],
        "lr_factor": 2.0,
        "reset": ["exp_avg"],
    }
    assert "after step 3 betas 0.999" in lines[0]["config"]["optimizer.switch"]
    assert Run(tmp_path).switched == 3
