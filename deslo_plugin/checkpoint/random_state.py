"""The random numbers of a process as plain values: Python's, numpy's where it is loaded, torch's of every device."""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = _lists(sys.modules["numpy"].random.get_state()) if "numpy" in sys.modules else None
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    if state["numpy"] is not None and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _lists(value: Any) -> Any:
    """With arrays as lists, which numpy takes back."""
    if isinstance(value, dict):
        return {key: _lists(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_lists, value))
    return value.tolist() if hasattr(value, "tolist") else value
