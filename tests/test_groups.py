"""What one device hides from a CPU, asked of real processes: whose step is called, which groups there are, who waits."""

import gpu_fault_jobs as jobs
import jobs as deepspeed_jobs
import pytest
import torch
from oracle import blocks
from test_deepspeed import ds_config
from test_stock import ds_config as stock_config
from theory import RULES, assert_oracle, oracle_states

S = RULES["mt-dao-adam-n2"]
