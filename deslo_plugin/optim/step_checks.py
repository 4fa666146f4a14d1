"""Where a step would do something else than it says: while a CUDA graph is captured, and without an attachment."""

from typing import Any

import torch

from deslo_plugin.comm.transport import left_alone
from deslo_plugin.errors import ConfigError


def refuse_capture(optimizer: Any) -> None:
    """Raises ``ConfigError`` where a CUDA graph is being captured: a step counts, decides and waits on the host, which
    a replay would not do again."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            f"{type(optimizer).__name__}.step",
            "a call outside of CUDA graphs",
            "one while a graph is captured, whose replays would never average",
            "capture the forward and backward alone (torch.cuda.make_graphed_callables) and step outside",
        )


def refuse_unattached(unattached: bool) -> None:
    """Raises ``ConfigError`` for the step of a ``DesLoc`` that is ``unattached`` in a world of several ranks."""
    if unattached and left_alone():
        raise ConfigError(
            "DesLoc.step",
            "deslo_plugin.attach(model, optimizer) before the first step",
            "none in a world of several ranks",
            "attach it, or say transport=SingleReplica() for an optimizer that averages nothing",
        )
