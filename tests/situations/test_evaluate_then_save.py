"""Between two steps a script evaluates, unshards, fails in a forward: what is saved then, and trained after, is the same to the bit."""

import pytest
import torch
import torch.distributed as dist
import torch_jobs
from oracle import blocks
from theory import RULES
from torch.distributed.fsdp import FSDPModule

S = RULES["des-loc-adam"]


def evaluate(model):
    with torch.no_grad():
        model(torch_jobs.batch(dist.get_rank(), 99, 0)[0])


def infer(model):
    with torch.inference_mode():
        model(torch_jobs.batch(dist.get_rank(), 99, 0)[0])


def unshard(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def fail(model):
    def break_(*_):
        raise ArithmeticError

    hook = model[-1].register_forward_pre_hook(break_)
    with pytest.raises(ArithmeticError):
        model(torch_jobs.batch(dist.get_rank(), 99, 0)[0])
    hook.remove()


def forward(model):
    """A forward whose backward comes later."""
    model.later = model(torch_jobs.batch(dist.get_rank(), 99, 0)[0]).sum()


MOMENTS = {"nothing": lambda model: None, "evaluation": evaluate, "inference": infer, "unshard": unshard, "failed forward": fail,
           "before the backward": forward}


def worked(wrap, moment, folder, options, config):
    """What save, average, meet and load give right after ``moment``, and what is trained after them."""
    import deslo_plugin

    moment, found = MOMENTS[moment], {}
    model, optimizer, _ = torch_jobs.attached(wrap, config, **options)

    def copies():
        return {name: torch_jobs.whole(p) for name, p in model.named_parameters()}

    torch_jobs.train(model, optimizer, range(5))
    moment(model)
    deslo_plugin.save(folder, model)
    found["saved"] = deslo_plugin.saved_state_dict(folder)
    moment(model)
    found["averaged"] = deslo_plugin.averaged_state_dict(model)
    moment(model)
    deslo_plugin.meet(model)
    found["met"] = copies()
    torch_jobs.train(model, optimizer, range(5, 8))
    moment(model)
    deslo_plugin.load(folder, model)
    found["loaded"] = copies()
    for step in range(5, 9):  # averages land in step(), after an evaluation that came between it and its backward
        torch_jobs.loss_of(model, torch_jobs.batch(dist.get_rank(), step, 0)).backward()
        if moment in (evaluate, infer):
            moment(model)
        optimizer.step()
        optimizer.zero_grad()
    return found | {"trained": copies()}


@pytest.mark.parametrize("wrap, moment, options", [
    ("fsdp", "evaluation", {}), ("fsdp", "inference", {"reshard_after_forward": False}), ("fsdp", "unshard", {}),
    ("fsdp", "failed forward", {}), ("fsdp", "before the backward", {}), ("hsdp", "evaluation", {}),
    ("fsdp", "evaluation", {"shape": (1, 4), "reshard_after_forward": 2}),
], ids=str)
def test_what_is_saved_and_trained_does_not_depend_on_the_moment(four, tmp_path, wrap, moment, options):
    calm, odd = (four().run(worked, wrap, each, str(tmp_path / each), options, blocks(S)) for each in ("nothing", moment))
    for own, other in zip(calm, odd):
        for kind, tensors in own.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, other[kind][name]), (kind, name)


def attached_after_an_evaluation(wrap, config):
    """The whole model was in memory when it was attached: what is trained from there."""
    import deslo_plugin

    model, where = torch_jobs.WRAPS[wrap](torch_jobs.net())
    optimizer = deslo_plugin.DesLoc(torch_jobs.two_groups(model), config)
    evaluate(model)
    deslo_plugin.attach(model, optimizer, **where)
    torch_jobs.train(model, optimizer, range(5))
    return {name: torch_jobs.whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("initial", ["check", "broadcast"])
def test_a_model_is_attached_after_an_evaluation(four, initial):
    config = blocks(S, initial_params=initial)
    calm = four().run(torch_jobs.run, "fsdp", config, 5)
    for own, other in zip(calm, four().run(attached_after_an_evaluation, "fsdp", config)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in own["states"]["params"].items())
