"""A config as a person wrote it: a JSON or YAML file, as a mapping that nothing has checked yet."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deslo_plugin.config.reader import repr_with_type
from deslo_plugin.errors import ConfigError


def read_file(path: Path) -> Mapping[str, Any]:
    """A JSON or YAML file as a mapping."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError("config", "a .json, .yaml or .yml file", repr(str(path)), "rename the file")
    if not path.is_file():
        raise ConfigError("config", "an existing file", repr(str(path)), "check the path")
    text = path.read_text()
    try:
        blocks = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"valid {path.suffix[1:].upper()}", str(error), "correct the file") from error
    if not isinstance(blocks, Mapping):
        raise ConfigError(str(path), "a mapping at the top level", repr_with_type(blocks), "write the two blocks there")
    return blocks
