"""Counters of parameters, read and advanced as one vector: whatever a script does to one of them, they are as if each
had been counted alone."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deslo_plugin import DesLoc
from deslo_plugin.algorithm.state_names import ORIGIN, STEP
from tests.support.device import cpu_only

PARAMS = 11  # enough for a vector
PERIODS = {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}


def write_as_numpy(state, key, value):
    state[key].numpy()[...] = value


def replace(state, key, value):
    state[key] = torch.tensor(value, dtype=torch.int64, device="cpu")


WRITES = {
    "fill_": lambda state, key, value: state[key].fill_(value),
    "copy_": lambda state, key, value: state[key].copy_(torch.tensor(value)),
    "detached": lambda state, key, value: state[key].detach().fill_(value),
    "data": lambda state, key, value: state[key].data.fill_(value),
    "numpy": write_as_numpy,
    "replaced": replace,
}


class Script:
    """A DesLoc on one replica, and what its counters must be: plain ints, by parameter."""

    def __init__(self):
        self.params = [torch.nn.Parameter(torch.full((1 + i % 3,), 1.0)) for i in range(PARAMS)]
        self.optimizer = self.make(self.params)
        self.step_of, self.origin_of = [0] * PARAMS, [0] * PARAMS

    @staticmethod
    def make(params):
        return DesLoc(params, lr=1e-3, sync_every=PERIODS)

    def step(self, without):
        """All parameters have gradients but those of ``without``, which only age."""
        for i, param in enumerate(self.params):
            param.grad = None if i in without else torch.ones_like(param)
            self.step_of[i] += 1
            self.origin_of[i] += i in without
        self.optimizer.step()

    def write(self, how, i, value):
        i %= len(self.params)
        WRITES[how](self.optimizer.state[self.params[i]], STEP, value)
        WRITES[how](self.optimizer.state[self.params[i]], ORIGIN, 0)
        self.step_of[i], self.origin_of[i] = value, 0

    def add(self, size):
        self.params += (new := [torch.nn.Parameter(torch.ones(2)) for _ in range(size)])
        clock = max(self.step_of)  # newcomers begin with the clock of all, and without updates
        self.step_of += [clock] * size
        self.origin_of += [clock] * size
        self.optimizer.add_param_group({"params": new})

    def load(self, by_file):
        # a checkpoint is of one step: the oldest parameter's is everyone's
        saved = self.optimizer.state_dict()
        if by_file:
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer = DesLoc(groups, lr=1e-3, sync_every=PERIODS)
        self.optimizer.load_state_dict(saved)

    def copy(self):
        self.params, self.optimizer = copy.deepcopy((self.params, self.optimizer))

    def check(self):
        states = [self.optimizer.state[param] for param in self.params]
        assert [int(state[STEP]) for state in states] == self.step_of
        assert [int(state[ORIGIN]) for state in states] == self.origin_of
        assert all(state[STEP].shape == () and state[STEP].dtype == torch.int64 for state in states)
        clock, live = self.optimizer._clock, list(zip(self.params, self.step_of))
        cohorts = {i: steps for steps, params in clock.by_steps(self.params) for i in map(id, params)}
        assert cohorts == {id(param): steps for param, steps in live}
        trained = {i: t for t, params in clock.by_steps(self.params, since=ORIGIN) for i in map(id, params)}
        assert trained == {id(p): s - o for p, s, o in zip(self.params, self.step_of, self.origin_of)}


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.sets(st.integers(0, PARAMS - 1), max_size=3)),
    st.tuples(st.just("step"), st.just(frozenset())),
    st.tuples(st.just("write"), st.sampled_from(sorted(WRITES)), st.integers(0, PARAMS - 1), st.integers(0, 99)),
    st.tuples(st.just("add"), st.integers(1, 9)),
    st.tuples(st.just("load"), st.booleans()),
    st.tuples(st.just("copy")),
)


@cpu_only("counters stay on the host")
@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(ACTIONS, min_size=4, max_size=14))
def test_counters_are_as_if_each_were_counted_alone(actions):
    script = Script()
    script.step(())
    script.step(())
    for name, *arguments in actions:
        getattr(script, name)(*arguments)
        script.check()


@pytest.mark.parametrize("how", WRITES)
def test_whoever_writes_one_counter_is_read(how):
    script = Script()
    for _ in range(3):
        script.step(())
    script.write(how, 5, 40)
    script.check()
    script.step(())
    script.check()


def counters_from_rank_0() -> tuple[list[int], list[int]]:
    """Rank 0 has made three steps more; everyone takes its counters by broadcast, in place, and steps once."""
    import torch.distributed as dist

    from deslo_plugin import SingleReplica

    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(PARAMS)]
    optimizer = DesLoc(
        params, {"optimizer": {"params": {"lr": 1e-3, "sync_every": PERIODS}}}, transport=SingleReplica()
    )
    for _ in range(3 if dist.get_rank() else 6):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        dist.broadcast(optimizer.state[param][STEP], 0)
    optimizer.step()
    return [int(optimizer.state[param][STEP]) for param in params], [optimizer.averaging.steps]


def test_counters_that_a_collective_wrote_are_read(four):
    assert four().run(counters_from_rank_0) == [([7] * PARAMS, [7])] * 4


def test_frozen_parameters_keep_their_count():
    script = Script()
    for _ in range(3):
        script.step(())
    frozen = script.params[4].requires_grad_(False)
    frozen.grad = None
    for _ in range(2):
        for param in script.params:
            param.grad = None if param is frozen else torch.ones_like(param)
        script.optimizer.step()
    counts = {int(script.optimizer.state[param][STEP]) for param in script.params if param is not frozen}
    assert counts == {5}
    frozen.requires_grad_()
    frozen.grad = torch.ones_like(frozen)
    script.optimizer.step()
    assert {int(script.optimizer.state[param][STEP]) for param in script.params if param is not frozen} == {6}
