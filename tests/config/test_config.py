"""The two config blocks: what they mean, and what every mistake is told."""

import json

import pytest
import yaml

from deslo_plugin import ConfigError, load_config


def optimizer(**params):
    return load_config({"optimizer": {"type": "DesLoc", "params": params}}).optimizer


def message(params=None, deslo=None):
    with pytest.raises(ConfigError) as error:
        load_config(
            {"optimizer": {"params": {} if params is None else params}, "deslo": {} if deslo is None else deslo}
        )
    return str(error.value)


def test_omitted_periods_are_three_and_six_times_that_of_params():
    config = optimizer(sync_every={"params": 40})
    assert config.periods == {"params": 40, "exp_avg": 120, "exp_avg_sq": 240}
    assert config.period_sources == {"params": "given", "exp_avg": "3 x params", "exp_avg_sq": "6 x params"}


def test_half_life_null_and_numbers():
    config = optimizer(betas=[0.99, 0.999], sync_every={"params": 8, "exp_avg": "half_life", "exp_avg_sq": None})
    assert config.periods == {"params": 8, "exp_avg": 69, "exp_avg_sq": None}
    assert config.period_sources["exp_avg"] == "half-life of 0.99"


def test_momenta_carry_their_own_periods():
    config = optimizer(
        momenta=[
            {"beta": 0.9, "weight": 0.5, "sync_every": 4},
            {"beta": 0.999, "weight": 0.3, "sync_every": "half_life"},
        ],
        second_moment={"beta": 0.9999, "sync_every": None},
        sync_every={"params": 32},
    )
    assert config.periods == {"params": 32, "exp_avg": 4, "exp_avg_2": 693, "exp_avg_sq": None}
    assert (config.betas, config.weights, config.beta2) == ((0.9, 0.999), (0.5, 0.3), 0.9999)


def test_dict_json_and_yaml_mean_the_same(tmp_path):
    blocks = {
        "optimizer": {"type": "DesLoc", "params": {"lr": 0.01}},
        "deslo": {"replica_size": 4},
        "train_batch_size": 8,
    }
    (tmp_path / "a.json").write_text(json.dumps(blocks))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(blocks))
    assert load_config(blocks) == load_config(tmp_path / "a.json") == load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"learning_rate": 1}, "optimizer.params.learning_rate: expected a known key"),
        ({"sync_evry": {}}, "did you mean 'sync_every'?"),
        (
            {"sync_every": {"params": 0}},
            "optimizer.params.sync_every.params: expected a whole number >= 1, got 0 (int)",
        ),
        (
            {"sync_every": {"exp_avg": -4}},
            "sync_every.exp_avg: expected a whole number >= 1, 'half_life', null, got -4 (int)",
        ),
        ({"sync_every": {"params": None}}, "sync_every.params: expected a whole number >= 1, got None"),
        ({"sync_every": {"params": 2.5}}, "expected a whole number >= 1, got 2.5 (float)"),
        ({"sync_every": {"exp_avg": True}}, "got True (bool)"),
        ({"sync_every": {"exp_av": 3}}, "did you mean 'exp_avg'?"),
        ({"sync_every": {"exp_avg": "halflife"}}, "the half-life of beta 0.9 is 6.6 steps"),
        ({"sync_every": 32}, "optimizer.params.sync_every: expected a mapping"),
        ({"momenta": [{"beta": 0.9, "weight": 0.7}, {"beta": 0.99, "weight": 0.7}]}, "sum to at most 1, got 1.4"),
        ({"momenta": [{"beta": 0.9, "weight": -0.1}]}, "momenta[0].weight: expected a number >= 0"),
        (
            {"momenta": [{"beta": 0.9, "weight": 0.2}, {"beta": 0.99}]},
            "momenta[1].weight: expected a number >= 0, got None",
        ),
        ({"momenta": []}, "momenta: expected a list of {beta, weight, sync_every}, got [] (list)"),
        (
            {"betas": [0.9, 0.95], "momenta": [{"beta": 0.9}]},
            "betas: expected either betas or momenta/second_moment, got both",
        ),
        ({"momenta": [{"beta": 0.9, "sync_every": 3}], "sync_every": {"exp_avg": 2}}, "expected one period, got two"),
        ({"betas": [0.9, 1.0]}, "betas.1: expected a number >= 0 and < 1, got 1.0"),
        ({"betas": [0.9]}, "betas: expected a list like [0.9, 0.95]"),
        ({"lr": "1e-4"}, "in YAML, 1e-4 is text"),
        ({"lr": "auto"}, "lr: expected a number >= 0, got 'auto' (str); give the value here"),
        ({"lr": float("nan")}, "lr: expected a number >= 0, got nan"),
        ({"rule": "adamw"}, "did you mean 'adam'?"),
        ({"rule": "sgdm", "eps": 1e-8}, "eps: expected no such key for rule sgdm"),
        ({"rule": "sgdm", "second_moment": {}}, "second_moment: expected no such key for rule sgdm"),
        (
            {"rule": "sgdm", "sync_every": {"exp_avg_sq": 3}},
            "sync_every.exp_avg_sq: expected a known key (exp_avg, params)",
        ),
        ({"rule": "adopt", "bias_correction": True}, "bias_correction: expected no such key for rule adopt"),
        ({"clip_value": 0}, "clip_value: expected a number > 0"),
        ({"clip": {"value": 1.0}}, "clip: expected its name of today, clip_value, a number, got an old one"),
        ({"state_dtype": "float16"}, "state_dtype: expected one of float32, bfloat16, got 'float16'"),
        (
            {"outer_optimizer": {"lr": 1.0, "nesterov": True}},
            "outer_optimizer.nesterov: expected a known key (lr, momentum)",
        ),
        ({"outer_optimizer": {"rate": 1.0}}, "outer_optimizer.rate: expected a known key (lr, momentum)"),
        (
            {"reset_momenta": True},
            "expected every momentum's sync_every to be null (here exp_avg, exp_avg_sq is averaged)",
        ),
        ([], "optimizer.params: expected a mapping of keys to values, got [] (list)"),
    ],
)
def test_mistakes_in_optimizer_params(params, expected):
    assert expected in message(params)


@pytest.mark.parametrize(
    ("deslo", "expected"),
    [
        ({"replica_sz": 2}, "did you mean 'replica_size'?"),
        ({"replica_size": 0}, "deslo.replica_size: expected a whole number >= 1, 'auto', got 0 (int)"),
        ({"average_at": "before"}, "did you mean 'before_step'?"),
        (
            {"average_at": "after_step", "overlap_comm": True},
            "overlap_comm: expected false with average_at 'after_step'",
        ),
        ({"wire_dtype": "int5"}, "wire_dtype: expected one of float32, float64, bfloat16"),
        ({"overlap_comm": "yes"}, "overlap_comm: expected true or false, got 'yes' (str)"),
        ({"timeout_s": 0}, "timeout_s: expected a number >= 1, got 0"),
        ({"transport": "cpu"}, "deslo.transport: expected one of device, host, auto, got 'cpu' (str)"),
        ({"transport": "hots"}, "did you mean 'host'?"),
        ({"transport": True}, "deslo.transport: expected one of device, host, auto, got True (bool)"),
        ({"transprt": "host"}, "did you mean 'transport'?"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb: expected a whole number >= 1"),
        (3, "deslo: expected a mapping"),
    ],
)
def test_mistakes_in_deslo(deslo, expected):
    assert expected in message(deslo=deslo)


@pytest.mark.parametrize(
    ("old", "today"),
    [
        (
            {"when": "after_update"},
            "deslo.when: expected its name of today, average_at, got an old one; write average_at",
        ),
        ({"average_at": "after_update"}, "write 'after_step', its name of today"),
        ({"delay": 2}, "sync_delay"),
        ({"weights": "samples"}, "replica_weights"),
        ({"replica_weights": "equal"}, "write 'uniform', its name of today"),
        ({"bucket_mb": 64}, "bucket_cap_mb"),
        ({"overlap": False}, "overlap_comm"),
        ({"checkpoint": "exact"}, "checkpoint_mode"),
        ({"checkpoint_mode": "exact"}, "write 'per_replica', its name of today"),
    ],
    ids=str,
)
def test_an_old_key_or_value_is_named_with_its_name_of_today(old, today):
    assert today in message(deslo=old)


def test_another_optimizer_type_or_a_key_beside_params_is_refused():
    for block, expected in (({"type": "AdamW"}, "write .deslo.: {.sync_every"), ({"lr": 1}, "optimizer.lr")):
        with pytest.raises(ConfigError, match=expected):
            load_config({"optimizer": block})


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, text, expected in (
        ("a.toml", "", "rename the file"),
        ("a.json", "{", "valid JSON"),
        ("b.yaml", "[1]", "mapping"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=expected):
            load_config(tmp_path / name)
    with pytest.raises(ConfigError, match="an existing file"):
        load_config(tmp_path / "none.json")
