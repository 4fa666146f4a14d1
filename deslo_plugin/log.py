"""What the package says, once and on one rank: banners and warnings under the logger ``deslo_plugin``."""

import logging
import sys

import torch.distributed as dist

logger = logging.getLogger("deslo_plugin")


def say(message: str, level: int = logging.INFO, *, anywhere: bool = False) -> None:
    """Logs on rank 0, or ``anywhere``. Without a logging set-up of the user's own, to stderr."""
    if not anywhere and dist.is_initialized() and dist.get_rank() != 0:
        return
    if not (logger.handlers or logging.getLogger().handlers):
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logger.log(level, message)
