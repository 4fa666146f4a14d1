"""What the README shows is true: its JSON is a config, its commands exist, its files are there."""

import json
import re
from pathlib import Path

import yaml

from deslo_plugin import load_config
from deslo_plugin.config.load import as_dict

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_json_is_a_config():
    (block,), page = code("json"), (ROOT / "docs" / "pytorch.md").read_text()
    (stock,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    config = load_config(json.loads(block))
    assert config.optimizer.periods == {"params": 32, "exp_avg": 96, "exp_avg_sq": 192}
    assert config.deslo.replica_size == load_config(json.loads(stock)).deslo.replica_size == 8
    assert load_config(json.loads(stock)).deslo.sync_every == config.optimizer.periods


def test_the_make_targets_and_named_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", TEXT):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"(?:configs|examples|benchmarks)/[\w./+-]+\w", TEXT):
        assert (ROOT / path).exists(), path


def test_every_key_is_in_the_tables_and_defaults_are_as_written():
    keys = [key.removeprefix("deslo.") for key in as_dict(load_config({})) if key.startswith("deslo.")]
    assert len(keys) > 15
    for name in keys:
        assert f"`{name}`" in (ROOT / "docs" / "configuration.md").read_text(), name
    defaults = load_config({})
    assert defaults.optimizer.periods == {"params": 32, "exp_avg": 96, "exp_avg_sq": 192}
    assert (defaults.optimizer.lr, defaults.optimizer.eps, defaults.optimizer.weight_decay) == (1e-3, 1e-8, 0.0)
    assert (defaults.optimizer.betas, defaults.optimizer.beta2) == ((0.9,), 0.95)
    assert (defaults.deslo.timeout_s, defaults.deslo.bucket_cap_mb, defaults.deslo.average_at) == (
        600,
        64,
        "before_step",
    )


def test_the_readme_is_read_to_the_end():
    assert len(TEXT.splitlines()) <= 140


def test_the_yaml_is_a_config():
    (block,) = code("yaml")
    assert load_config(yaml.safe_load(block)).optimizer.periods == {"params": 32, "exp_avg": 96, "exp_avg_sq": 192}


def test_the_python_is_valid():
    for block in code("python"):
        compile(block, "README.md", "exec")
