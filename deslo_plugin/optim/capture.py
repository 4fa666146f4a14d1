"""CUDA graphs: a step counts, decides and waits on the host, which a replay would not do again."""

from typing import Any

import torch

from deslo_plugin.errors import ConfigError


def refuse_capture(optimizer: Any) -> None:
    """Raises ``ConfigError`` where a CUDA graph is being captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            f"{type(optimizer).__name__}.step",
            "a call outside of CUDA graphs",
            "one while a graph is captured, whose replays would never average",
            "capture the forward and backward alone (torch.cuda.make_graphed_callables) and step outside",
        )
