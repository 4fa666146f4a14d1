"""What ranks of a test world need, imported once: by the server that forks them."""

import contextlib
import importlib
import os

from tests.support import device

os.environ["DS_ACCELERATOR"] = device.ACCELERATOR
os.environ.setdefault("RUST_LOG", "error")  # what torchft's lighthouse writes; read at its import
NAMES = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "deepspeed",
    "accelerate",
    "torchft",
    "lightning.pytorch",
    "deslo_plugin",
)
for name in NAMES:
    with contextlib.suppress(ImportError):  # an environment of the matrix has some of them
        importlib.import_module(name)
