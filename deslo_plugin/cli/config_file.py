"""The config file that a command is given: what a job would read of it, and nothing that only a job can fill in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deslo_plugin.cli.self_test import without_auto
from deslo_plugin.config.file import read_file
from deslo_plugin.config.load import load_config
from deslo_plugin.config.schema import Config
from deslo_plugin.config.shipped import find_config
from deslo_plugin.errors import ConfigError


@dataclass(frozen=True)
class ConfigFile:
    """``blocks`` as the file has them; ``config`` without the values at the paths ``left_out``, which are "auto"."""

    blocks: Mapping[str, Any]
    config: Config
    left_out: tuple[str, ...] = ()


def given(path: Path | None) -> ConfigFile:
    """Of a file, or one of ours by name; without, the papers' default. Raises ``ConfigError`` for a file that no job
    reads."""
    if path is None:
        return ConfigFile({}, load_config({}))
    blocks = read_file(find_config(path))
    if "optimizer" not in blocks and "deslo" not in blocks:
        raise ConfigError(
            "--config",
            'a file with an "optimizer" or a "deslo" block',
            f"neither in {str(path)!r}",
            "give the file that the job reads them from",
        )
    left_out = tuple(each for block in ("optimizer", "deslo") for each in _auto(block, blocks.get(block)))
    return ConfigFile(blocks, load_config(without_auto(blocks)), left_out)


def _auto(where: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if each == "auto" and key != "replica_size":
                yield f"{where}.{key}"
            yield from _auto(f"{where}.{key}", each)
