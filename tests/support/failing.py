"""Calls that fail on one rank alone, and what is said of it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist


@contextmanager
def failing(rank: int, target: str, error: BaseException) -> Iterator[None]:
    """Whatever calls ``target`` on ``rank`` gets ``error``."""
    with ExitStack() as stack:
        if dist.get_rank() == rank:
            stack.enter_context(mock.patch(target, side_effect=error))
        yield


def tree_of(kind: str) -> str:
    in_engine = kind.startswith("zero")
    held = "frameworks.deepspeed.state_tree.EngineState" if in_engine else "checkpoint.state_tree.TorchState"
    return f"deslo_plugin.{held}.tree"


def said_of(act: Callable[[], Any]) -> tuple[str, int | None, str]:
    """What ``act`` raises: its kind, the system's number, its sentence."""
    try:
        act()
    except OSError as error:
        return "OSError", error.errno, str(error)
    except BaseException as error:
        return type(error).__name__, None, str(error)
    return "no error", None, ""
