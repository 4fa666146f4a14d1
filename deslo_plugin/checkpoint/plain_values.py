"""Values that a file can hold without holding code: what is read back is data, whoever wrote the file."""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from deslo_plugin.checkpoint.location import flush
from deslo_plugin.errors import ConfigError

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
MAPPINGS = (dict, OrderedDict, Counter)
PLAIN = "dicts, lists and tuples of text, bytes, numbers, None and tensors"
HINTS = {
    "ndarray": "give torch.from_numpy(value), or value.tolist()",
    "set": "give list(value)",
    "frozenset": "give list(value)",
    "deque": "give list(value)",
    "defaultdict": "give dict(value)",
    "function": "leave it out: it is code",
    "method": "leave it out: it is code",
}


def plain(value: Any, where: str) -> Any:
    """``value`` with numpy's single numbers made Python's. Raises ``ConfigError`` for what ``read_plain`` would not
    give back, with the keys that lead to it and its type."""
    try:
        return _plain(value, where)
    except RecursionError as error:
        raise ConfigError(where, PLAIN, "containers that contain themselves", "leave that out") from error


def _plain(value: Any, where: str) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind in MAPPINGS:
        pairs = [(_key(key, where), _plain(each, f"{where}[{key!r}]")) for key, each in value.items()]
        return kind(dict(pairs)) if kind is Counter else kind(pairs)
    if kind in (list, tuple):
        return kind(_plain(each, f"{where}[{index}]") for index, each in enumerate(value))
    if kind in (Tensor, Parameter) and not value.is_quantized:
        return value.detach() if value.requires_grad else value
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == () and kind.__name__ != "ndarray":
        return _plain(value.item(), where)
    raise ConfigError(
        where,
        f"plain values ({PLAIN})",
        f"{kind.__module__}.{kind.__qualname__}",
        HINTS.get(kind.__name__, "give what it is made of, such as its state_dict()"),
    )


def _key(key: Any, where: str) -> Any:
    return _plain(key, f"a key of {where}")


def expect_mapping(value: Any, where: str) -> dict[str, Any]:
    """Its plain values by name; none for None."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(where, "a dict", type(value).__name__, "write {...} there")
    return plain(dict(value or {}), where)


def write_plain(value: Any, file: Path) -> None:
    """Writes what ``plain`` gave, to the disk."""
    with file.open("wb") as content:
        torch.save(value, content)
        flush(content)


def read_plain(file: Path) -> Any:
    """What ``write_plain`` wrote, tensors on the CPU. Raises ``ConfigError`` for whatever else a file holds, and runs
    nothing."""
    try:
        with file.open("rb") as content:
            return torch.load(content, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ConfigError(
            str(file), "plain values", str(error).splitlines()[0], "take another checkpoint: nothing of it was run"
        ) from error
