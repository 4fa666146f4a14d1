"""``state_dict()`` inside somebody else's saver: refused with the line to write, the average, or the last average on
rank 0 alone."""

import pytest
import torch
import torch.distributed as dist

from tests.support import torch_jobs
from tests.support.checkpoint_jobs import Job
from tests.support.oracle import blocks
from tests.support.savers import EVERY_4, Lines, config_of, module_of
from tests.support.theory import RULES

S = RULES["mt-dao-adam-n2"]  # parameters every 4 steps, biases every 2


def on_every_rank(kind, config):
    """What every rank's state_dict() is beside the average, and whether training has noticed."""
    import deslo_plugin

    job, twin = Job(kind, config), Job(kind, config)
    for each in (job, twin):
        each.train(range(6))
    given, inner = job.model.state_dict(), module_of(job.model).state_dict()
    if not kind.startswith("zero"):
        job.optimizer.state_dict()
    expected = deslo_plugin.averaged_state_dict(job.model, as_trained=True)
    plain = {name.removeprefix("module."): torch_jobs.whole(value) for name, value in given.items()}
    assert list(given) == list(twin_keys(twin)) and plain.keys() == expected.keys() == inner.keys()
    far = max(float((plain[name] - value.flatten()).abs().max()) for name, value in expected.items())
    for each in (job, twin):
        each.train(range(6, 11))
    same = [
        torch.equal(value, other[name])
        for state, other in zip(job.states().values(), twin.states().values())
        for name, value in state.items()
    ]
    job.close(), twin.close()
    return far, all(same)


def twin_keys(job):
    import deslo_plugin

    with deslo_plugin.local_state_dict():
        return job.model.state_dict()


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp", "hsdp"])
def test_averaged_gives_the_mean_where_every_rank_calls(four, kind):
    assert all(far < 1e-6 and same for far, same in four().run(on_every_rank, kind, config_of(kind, "averaged")))


def engine_weights(kind, config):
    """How far state_dict() of an engine's module is from the average of the masters."""
    import deslo_plugin

    job = Job(kind, config)
    job.train(range(6))
    given, expected = job.model.module.state_dict(), deslo_plugin.averaged_state_dict(job.model, as_trained=True)
    job.train(range(6, 9))
    job.close()
    return max(float((given[name] - value).abs().max()) for name, value in expected.items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_averaged_gives_whole_weights_of_an_engine(four, stage):
    kind = f"zero {stage}"
    assert max(four().run(engine_weights, kind, config_of(kind, "averaged"))) < 1e-6


def called_alone(call, config):
    """Rank 0 makes a collective call inside ``if rank == 0:`` while the others train on: what it is told; then all go
    on."""
    import deslo_plugin

    job = Job("plain", config)
    job.train(range(6))
    said = ""
    if dist.get_rank() == 0:
        try:
            {
                "averaged_state_dict": lambda: deslo_plugin.averaged_state_dict(job.model),
                "meet": lambda: deslo_plugin.sync_replicas(job.model),
                "save": lambda: deslo_plugin.save("/nonexistent/c", job.model),
                "state_dict": lambda: job.model.state_dict(),
            }[call]()
        except deslo_plugin.ConfigError as error:
            said = str(error)
    job.train(range(6, 10))
    deslo_plugin.sync_replicas(job.model)
    return said


@pytest.mark.parametrize(
    "call, name",
    [
        ("averaged_state_dict", "averaged_state_dict()"),
        ("save", "save()"),
        ("meet", "sync_replicas()"),
        ("state_dict", "Sequential.state_dict()"),
    ],
)
def test_a_collective_call_on_rank_0_alone_is_an_error_as_soon_as_others_go_on(four, call, name):
    first, *others = four().run(called_alone, call, config_of("plain", "averaged"))
    assert first == (
        f"{name}: expected a call on every rank, got none on rank(s) [1, 2, 3], which went on to the average after "
        "step 6; move it out of `if rank == 0:` and the like: it is collective, and only what writes its result "
        "belongs there"
    )
    assert others == [""] * 3


def called_differently(config):
    import deslo_plugin

    job = Job("plain", config)
    job.train(range(2))
    try:
        deslo_plugin.sync_replicas(job.model) if dist.get_rank() == 0 else deslo_plugin.averaged_state_dict(job.model)
    except deslo_plugin.ConfigError as error:
        return str(error)
    return "no error"


def test_two_different_collective_calls_are_an_error_on_every_rank(four):
    first, *others = four().run(called_differently, blocks(S))
    assert "sync_replicas(): expected a call on every rank, got averaged_state_dict() on rank" in first
    assert all(
        "averaged_state_dict(): expected a call on every rank, got sync_replicas() on rank 0" in error
        for error in others
    )


def refusal(config):
    import deslo_plugin

    job = Job("ddp", config)
    job.train(range(2))
    with pytest.raises(deslo_plugin.ConfigError) as error:
        job.model.state_dict()
    return str(error.value)


def test_the_refusal_says_that_its_calls_are_for_every_rank_and_the_keys_for_other_ways(four):
    for error in four().run(refusal, config_of("ddp", "refuse")):
        assert error.startswith("DistributedDataParallel.state_dict(): expected one model, got one of 4 replicas")
        assert all(word in error for word in ("on EVERY rank", "`if rank == 0:`", '"averaged"', '"last_average"'))


def announced(mode):
    """What attaching says of saving on rank 0."""
    import deslo_plugin

    model = torch_jobs.net()
    optimizer = deslo_plugin.DesLoc(model.parameters(), {"optimizer": EVERY_4, "deslo": {"state_dict": mode}})
    with Lines() as said:
        deslo_plugin.attach(model, optimizer)
    return [line for line in said if "state_dict()" in line]


@pytest.mark.parametrize(
    "mode, words",
    [
        ("refuse", "state_dict() raises while replicas differ. To save, call deslo_plugin.save(path, model)"),
        ("averaged", "state_dict() gives the average of all replicas while they differ: call it on every rank"),
        ("last_average", "on any rank alone: 332 bytes of each rank's host memory"),
    ],
)
def test_attach_says_what_state_dict_will_do(four, mode, words):
    (line,) = four().run(announced, mode)[0]
    assert words in line


def copied(config):
    """A moving average of the weights, which each replica keeps for itself: what its state_dict() says, and its
    mean."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    import deslo_plugin
    from deslo_plugin.checkpoint import state_dict_guard

    state_dict_guard._copies_told.clear()  # it is said once in a process, which other tests have used
    job = Job("ddp", config)
    inner = job.model.module
    average = AveragedModel(inner, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(6):
        job.train(range(step, step + 1))
        average.update_parameters(inner)
    with Lines() as said:
        own = average.module.state_dict()
        average.state_dict()
    mean = deslo_plugin.averaged_state_dict(job.model, of=average.module)
    again = deslo_plugin.averaged_state_dict(job.model, of=dict(own), as_trained=True)
    torch_jobs.net().load_state_dict(mean)
    for name, value in own.items():
        everyone = [torch.empty_like(value) for _ in range(4)]
        dist.all_gather(everyone, value.contiguous())
        assert not torch.equal(everyone[0], everyone[1])
        assert torch.allclose(mean[name], torch.stack(everyone).mean(0), atol=1e-6) and torch.equal(
            mean[name], again[name]
        )
    whole = deslo_plugin.averaged_state_dict(job.model, of=average)
    assert int(whole["n_averaged"]) == 6 and torch.equal(whole["module.0.weight"], mean["0.weight"])
    return said


def test_a_moving_average_of_the_weights_is_averaged_over_replicas_and_its_own_state_dict_says_what_it_is(four):
    said = four().run(copied, config_of("ddp", "refuse"))
    assert said[0] == [
        "deslo: state_dict() of a copy of the model (Sequential) gives what this replica has made of it, such as its "
        "own moving average; the mean of all replicas' is deslo_plugin.averaged_state_dict(model, of=copy), on every "
        "rank"
    ]
    assert said[1:] == [[]] * 3
