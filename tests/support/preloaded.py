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
    "torch._dynamo",  # the first backward of a hooked module imports it
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # the first engine imports it, and much with it
    "accelerate",
    "torchft",
    "lightning.pytorch",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "deslo_plugin",
)
for name in NAMES:
    with contextlib.suppress(ImportError):  # an environment of the matrix has some of them
        importlib.import_module(name)
with contextlib.suppress(ImportError):
    from deepspeed.ops import __compatible_ops__

    # an op for inference only, which the first engine would compile, and whose lock outlives a killed process
    __compatible_ops__["deepspeed_shm_comm"] = False
