"""What the package says, once and on one rank: banners and warnings under the logger ``deslo_plugin``."""

import logging
import os
import sys

import torch.distributed as dist

logger = logging.getLogger("deslo_plugin")
# of this process, by its launcher, then as long as it is known: the last messages come after the process group is gone
_rank = int(os.environ.get("RANK", 0))


def log_rank0(message: str, level: int = logging.INFO, *, anywhere: bool = False) -> None:
    """Logs on rank 0, or ``anywhere``. Without any logging set-up, to stderr; no logger is changed."""
    global _rank
    _rank = dist.get_rank() if dist.is_initialized() else _rank
    if _rank != 0 and not anywhere:
        return
    if logger.hasHandlers():
        logger.log(level, message)
    elif level >= max(logger.level or logging.INFO, logger.manager.disable + 1):
        print(message, file=sys.stderr, flush=True)


def announce(message: str) -> None:
    """Says ``message``, or its first line where a script's logging shows warnings alone: that it works must be seen."""
    if logger.isEnabledFor(logging.INFO) or not logger.hasHandlers():
        log_rank0(message)
    else:
        log_rank0(message.splitlines()[0], logging.WARNING)
