"""Runs a script as Accelerate would on GPUs: it offers FSDP on accelerators only, and its code for them runs on the CPU
too."""

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
_init = PartialState.__init__


def init(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = init
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
