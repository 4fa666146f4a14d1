"""From a synchronous AdamW run to replicas: its own state dict, one of torch.distributed.checkpoint, and ours of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict

import deslo_plugin
from deslo_plugin import ConfigError, DesLoc
from tests.support import checkpoint_jobs, synchronous_jobs
from tests.support.engine_configs import ds_config
from tests.support.jobs import batch, loss_of, net, two_groups
from tests.support.oracle import Switch, blocks
from tests.support.theory import RULES
from tests.support.torch_jobs import stock_groups

STEPS = 5
TWO = replace(RULES["mt-dao-adam-n2"], weights=[1.0, 0.0], beta2=0.95)
S = replace(TWO, switch=Switch(STEPS, [0.9, 0.99], [0.05, 0.95], 2.0, (1, 2)))
WARM = {"synchronous_steps": STEPS}


def trained(model, optimizer, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(0, step, 0)).backward()
        optimizer.step()
    return model, optimizer


def adamw_run():
    model = net()
    return trained(
        model, torch.optim.AdamW(stock_groups(model), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    )


def ours(s=S, seed=1, **deslo):
    model = net(seed)
    optimizer = DesLoc(two_groups(model), blocks(s, **(WARM | deslo)))
    deslo_plugin.attach(model, optimizer)
    return model, optimizer


def starting_from(file: Path, model, optimizer):
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


def assert_taken_over(model, optimizer, theirs, adamw):
    for param, other in zip(model.parameters(), theirs.parameters()):
        state, before = optimizer.state[param], adamw.state[other]
        assert torch.equal(param, other) and state["step"] == before["step"] == STEPS
        assert all(torch.equal(state[name], before[name]) for name in ("exp_avg", "exp_avg_sq"))
        assert not state["exp_avg_2"].any()


def test_a_plain_adamw_state_goes_on_with_the_switch_as_if_it_had_been_ours(tmp_path):
    """A momentum of weight 0 before the switch, which resets it, need not be there."""
    theirs, adamw = adamw_run()
    torch.save({"model": theirs.state_dict(), "optimizer": adamw.state_dict()}, tmp_path / "adamw.pt")
    model, optimizer = starting_from(tmp_path / "adamw.pt", *ours())
    assert_taken_over(model, optimizer, theirs, adamw)
    trained(model, optimizer, range(STEPS, 12))
    straight, _ = trained(*ours(seed=7), range(12))
    for mine, other in zip(model.parameters(), straight.parameters()):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_a_state_by_parameter_names_of_torch_distributed_checkpoint_is_taken_over(tmp_path):
    theirs, adamw = adamw_run()
    model_state, optimizer_state = get_state_dict(theirs, adamw)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "adamw.pt")
    assert_taken_over(*starting_from(tmp_path / "adamw.pt", *ours()), theirs, adamw)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero 2"])
def test_ours_made_of_it_in_one_process_starts_every_framework(four, tmp_path, kind):
    theirs, adamw = adamw_run()
    torch.save({"model": theirs.state_dict(), "optimizer": adamw.state_dict()}, tmp_path / "adamw.pt")
    model, _ = starting_from(tmp_path / "adamw.pt", *ours())
    deslo_plugin.save(tmp_path / "start", model, mode="averaged")
    more = {"replica_size": 2} if kind == "ddp" else {}
    config = ds_config(S, 2, deslo=WARM) if kind == "zero 2" else blocks(S, **WARM, **more)
    names = {id(param): name for name, param in theirs.named_parameters()}
    for result in four().run(checkpoint_jobs.loaded, kind, config, str(tmp_path / "start")):
        assert result["steps"] == STEPS
        for param in theirs.parameters():
            for state in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(result["states"][state][names[id(param)]], adamw.state[param][state].flatten())
            assert not result["states"]["exp_avg_2"][names[id(param)]].any()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_checkpoint_starts_replicas(four, tmp_path, stage):
    weights, *_ = four().run(synchronous_jobs.adamw_of_deepspeed, stage, str(tmp_path), STEPS)
    model = net(seed=1)
    optimizer = DesLoc(model.parameters(), blocks(S, **WARM))
    deslo_plugin.attach(model, optimizer)
    starting_from(tmp_path / "adamw.pt", model, optimizer)
    for name, param in model.named_parameters():
        assert torch.equal(param, weights[name]) and optimizer.state[param]["exp_avg_sq"].any()
        assert optimizer.state[param]["step"] == STEPS and not optimizer.state[param]["exp_avg_2"].any()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2]


def test_what_cannot_be_taken_over_is_refused():
    model, optimizer = ours()
    theirs, adamw = adamw_run()
    momentum = torch.optim.SGD(stock_groups(theirs), lr=0.1, momentum=0.9)
    trained(theirs, momentum)
    with pytest.raises(
        ConfigError, match="expected step and exp_avg, exp_avg_2, exp_avg_sq of shape .* got momentum_b"
    ):
        optimizer.load_state_dict(momentum.state_dict())
    state = adamw.state_dict()
    for each in state["state"].values():
        each.pop("exp_avg_sq")
    with pytest.raises(ConfigError, match="exp_avg_sq of shape .8, 6., got exp_avg .8, 6.; load the"):
        optimizer.load_state_dict(state)
    wide = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    _, other = trained(wide, torch.optim.AdamW(stock_groups(wide)))
    with pytest.raises(ConfigError, match="of shape .8, 6., got exp_avg .9, 6."):
        optimizer.load_state_dict(other.state_dict())
    adamw = adamw_run()[1].state_dict()
    late, early = (replace(S, switch=replace(S.switch, at=at)) for at in (STEPS + 1, STEPS - 1))
    with pytest.raises(
        ConfigError, match="at 5 or later: so many steps are complete, and these states have not switch"
    ):
        ours(early, synchronous_steps=STEPS - 1)[1].load_state_dict(adamw)
    with pytest.raises(ConfigError, match="states of ADOPT, .* got Adam's; take .rule.: .adam., or set .*switch.at"):
        ours(replace(late, rule="adopt"))[1].load_state_dict(adamw)
    ours(replace(S, rule="adopt"))[1].load_state_dict(adamw)  # all of its momenta are reset now
