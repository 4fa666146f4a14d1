"""How many parameters a model has, without its weights: built on the meta device, or taken as a number."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from deslo_plugin.errors import ConfigError

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
FORMS = "a Hugging Face config (a config.json or its folder), or package.module:function, which returns an nn.Module"


def parse_count(text: str) -> int:
    """``"1.3B"``, ``"124M"`` or ``"124439808"``; K, M, B and T are powers of 1000."""
    digits, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    try:
        count = float(digits) * unit
    except ValueError:
        count = 0.0
    if not 1 <= count < float("inf"):
        raise ConfigError("--params", "a number like 124439808, 350M or 1.3B", repr(text), "correct it")
    return round(count)


def count_parameters(model: str) -> int:
    """Elements of all parameters, those that are tied counted once. ``model``: see ``FORMS``."""
    with torch.device("meta"):
        built = _from_hugging_face(Path(model)) if Path(model).exists() else _from_module(model)
    return sum(param.numel() for param in built.parameters())


def _from_hugging_face(path: Path) -> nn.Module:
    if find_spec("transformers") is None:
        raise ConfigError(
            "--model",
            "transformers installed, to read a Hugging Face config",
            "none",
            "pip install transformers, or give the number as --params",
        )
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path)
        kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
        return kind.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            "--model",
            "a Hugging Face config that transformers can build",
            f"{str(path)!r}: {reason}",
            "correct it, or give the number as --params",
        ) from error


def _from_module(path: str) -> nn.Module:
    name, _, function = path.partition(":")
    if not (name and function):
        raise ConfigError("--model", FORMS, repr(path), "check the path, or give the number as --params")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        built = getattr(importlib.import_module(name), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "--model",
            "package.module:function that can be imported",
            f"{path!r}: {error}",
            "run the command where the package can be found",
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(built, nn.Module):
        raise ConfigError(
            f"--model {path}", "a function that returns an nn.Module", type(built).__name__, "return the model"
        )
    return built
