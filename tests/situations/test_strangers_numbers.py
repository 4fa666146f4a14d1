"""Numbers, lists and mappings of other libraries in a config: taken as what they say."""

import collections
from fractions import Fraction

import numpy as np
import pytest
import torch

from deslo_plugin import ConfigError, DesLoc, load_config
from deslo_plugin.config.load import as_dict


class ListOf(collections.UserList):
    """As a configuration library's: a sequence that is no list."""


class MappingOf(collections.UserDict):
    """As a configuration library's: a mapping that is no dict."""


PLAIN = {
    "optimizer": {
        "params": {"lr": 0.5, "betas": [0.75, 0.5], "weight_decay": 0.25, "sync_every": {"params": 4, "exp_avg": 8}}
    },
    "deslo": {"replica_size": 2, "timeout_s": 30, "overlap_comm": True},
}
NUMPY = {
    "optimizer": {
        "params": {
            "lr": np.float32(0.5),
            "betas": np.array([0.75, 0.5]),
            "weight_decay": np.float16(0.25),
            "sync_every": {"params": np.int64(4), "exp_avg": np.uint8(8)},
        }
    },
    "deslo": {"replica_size": np.int32(2), "timeout_s": np.int64(30), "overlap_comm": np.bool_(True)},
}
TORCH = {
    "optimizer": {
        "params": {
            "lr": torch.tensor(0.5),
            "betas": (torch.tensor(0.75), torch.tensor(0.5)),
            "weight_decay": Fraction(1, 4),
            "sync_every": {"params": torch.tensor(4), "exp_avg": 8},
        }
    },
    "deslo": {"replica_size": 2, "timeout_s": 30, "overlap_comm": True},
}


def strange(value):
    if isinstance(value, dict):
        return MappingOf({key: strange(each) for key, each in value.items()})
    return ListOf(map(strange, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("blocks", [NUMPY, TORCH, strange(PLAIN)], ids=["numpy", "torch", "user types"])
def test_a_config_of_strangers_is_the_plain_one(blocks):
    assert as_dict(load_config(blocks)) == as_dict(load_config(PLAIN))


def test_periods_and_rates_of_a_param_group_too():
    param = torch.nn.Parameter(torch.ones(2))
    group = {"params": [param], "lr": np.float32(0.5), "weight_decay": np.float32(0.5)}
    optimizer = DesLoc([group | {"sync_every": MappingOf(params=np.int64(4))}])
    assert type(optimizer.param_groups[0]["sync_every"]["params"]) is int
    param.grad = torch.ones(2)
    optimizer.step()
    assert torch.allclose(param, torch.full((2,), 1 - 0.25 - 0.5), atol=1e-6)


def test_a_rate_that_is_a_tensor_stays_the_one_that_the_script_fills():
    for rate in (torch.tensor(0.5), torch.tensor([0.5])):
        param = torch.nn.Parameter(torch.ones(2))
        optimizer = DesLoc([param], lr=rate)
        rate.fill_(0.0)
        param.grad = torch.ones(2)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] is rate and torch.equal(param, torch.ones(2))


@pytest.mark.parametrize("period", [np.float32(4.5), np.int64(0), "4", np.array([4, 4])])
def test_what_is_no_period_is_refused_still(period):
    with pytest.raises(ConfigError, match="sync_every.params: expected a whole number >= 1"):
        load_config({"optimizer": {"params": {"sync_every": {"params": period}}}})
