"""Between two steps a script evaluates, unshards, fails in a forward: what is saved then, and trained after, is the
same to the bit."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tests.support import torch_jobs
from tests.support.checkpoint_jobs import Job
from tests.support.oracle import blocks
from tests.support.theory import RULES

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


MOMENTS = {
    "nothing": lambda model: None,
    "evaluation": evaluate,
    "inference": infer,
    "unshard": unshard,
    "failed forward": fail,
    "before the backward": forward,
}


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
    found["saved"] = deslo_plugin.load_averaged_state_dict(folder)
    moment(model)
    found["averaged"] = deslo_plugin.averaged_state_dict(model)
    moment(model)
    deslo_plugin.sync_replicas(model)
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


@pytest.mark.parametrize(
    "wrap, moment, options",
    [
        ("fsdp", "evaluation", {}),
        ("fsdp", "inference", {"reshard_after_forward": False}),
        ("fsdp", "unshard", {}),
        ("fsdp", "failed forward", {}),
        ("fsdp", "before the backward", {}),
        ("hsdp", "evaluation", {}),
        ("fsdp", "evaluation", {"shape": (1, 4), "reshard_after_forward": 2}),
    ],
    ids=str,
)
def test_what_is_saved_and_trained_does_not_depend_on_the_moment(four, tmp_path, wrap, moment, options):
    calm, odd = (
        four().run(worked, wrap, each, str(tmp_path / each), options, blocks(S)) for each in ("nothing", moment)
    )
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


def evaluated(kind, config):
    """Outputs of the average on every rank, how far its weights are from it, and whether training has noticed."""
    import deslo_plugin

    job, twin = Job(kind, config), Job(kind, config)
    for each in (job, twin):
        each.train(range(5))
    expected = deslo_plugin.averaged_state_dict(job.model)
    with deslo_plugin.averaged_weights(job.model):
        with torch.no_grad():
            outputs = job.model(torch_jobs.batch(0, 99, 0)[0])
        given = (
            {}
            if kind == "zero 3"
            else {
                name.removeprefix("module."): torch_jobs.whole(value) for name, value in job.model.state_dict().items()
            }
        )
    far = max((float((value - expected[name].flatten()).abs().max()) for name, value in given.items()), default=0.0)
    plain = torch_jobs.net()
    plain.load_state_dict(expected)
    far = max(far, float((plain(torch_jobs.batch(0, 99, 0)[0]) - outputs).abs().max()))
    losses = [each.train(range(5, 11)) for each in (job, twin)]
    same = all(
        torch.equal(value, other[name])
        for state, other in zip(job.states().values(), twin.states().values())
        for name, value in state.items()
    )
    job.close(), twin.close()
    return far, same and losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp", "hsdp", "zero 0", "zero 1", "zero 2", "zero 3"])
def test_the_average_is_evaluated_and_training_goes_on_to_the_bit(four, kind):
    config = blocks(S, replica_size=2) if kind != "plain" else blocks(S)
    if kind.startswith("zero"):
        config = {**config, "zero_optimization": {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0}}
    for far, same in four().run(evaluated, kind, config):
        assert far < 1e-6 and same


def stepped_inside(config):
    import deslo_plugin

    job = Job("plain", config)
    job.train(range(2))
    before = [p.clone() for p in job.model.parameters()]
    with pytest.raises(deslo_plugin.ConfigError, match="no optimizer step inside, got 1"):
        with deslo_plugin.averaged_weights(job.model):
            job.train(range(2, 3))
    with pytest.raises(ArithmeticError):
        with deslo_plugin.averaged_weights(job.model):
            raise ArithmeticError
    return all(torch.equal(p, own) for p, own in zip(job.model.parameters(), before))


def test_own_weights_come_back_whatever_happens_inside(four):
    assert four().run(stepped_inside, blocks(S)) == [True] * 4
