"""bfloat16 momenta: rounded at random so that slow averages do not stand still, and alike wherever they are
computed."""

import copy

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc
from deslo_plugin.algorithm import stochastic_rounding as rounding
from deslo_plugin.kernels import update as ops
from tests.support.cases import FLOAT32, Case, assert_close, assert_same_bits
from tests.support.worlds import threads

BRIEF = (torch.float32, torch.float32, torch.bfloat16, None)
NATIVE = [True, False]
ELEMENTS, STEPS = 4096, 3000


def update_of(rule, native):
    return getattr(torch.ops.deslo, f"{rule}_") if native else ops.reference(rule)


@pytest.mark.parametrize("native", NATIVE, ids=["native", "reference"])
def test_slow_moments_do_not_stall(kernels, native):
    """v at beta2 = 0.999 and u at beta = 0.9999, mean of many elements, against float64: rounding to nearest is 30%
    off."""
    generator, adam = torch.Generator().manual_seed(0), update_of("adam", native)
    x, u, v = torch.zeros(ELEMENTS), torch.full((ELEMENTS,), 0.5).bfloat16(), torch.zeros(ELEMENTS).bfloat16()
    true_u, true_v = u.double(), v.double()
    for t in range(STEPS):
        g = 1 + 0.1 * torch.randn(ELEMENTS, generator=generator)
        adam(
            [x],
            [g],
            [u],
            [v],
            [],
            t=t,
            lr=0.0,
            weight_decay=0.0,
            betas=[0.9999],
            weights=[1.0],
            beta2=0.999,
            eps=1e-8,
            bias_correction=True,
        )
        true_u.lerp_(g.double(), 1e-4)
        true_v.lerp_(g.double().square(), 1e-3)
    for ours, theirs in ((u, true_u), (v, true_v)):
        assert abs(ours.double().mean() / theirs.mean() - 1) < 0.01
        assert (ours.double() / theirs - 1).abs().max() < 0.2


def test_rounding_is_right_on_average_and_exact_where_it_can_be():
    value = torch.tensor([1.0, -1.0, 1 + 2**-9, -1 - 3 * 2**-9, 0.0, float("inf"), float("-inf"), 3e38, float("nan")])
    target, total = torch.empty(value.numel(), dtype=torch.bfloat16), torch.zeros(value.numel(), dtype=torch.float64)
    for t in range(10_000):
        rounding.round_(target, value, t, 1)
        total += target.double()
        assert ((target - value)[:4].abs() < 2**-7).all()
    mean = total / 10_000
    assert mean[[0, 1, 4, 5, 6]].equal(value[[0, 1, 4, 5, 6]].double()) and mean[8].isnan()
    assert ((mean[:4] - value[:4]).abs() < 2e-4).all()


DRAWS = {
    "element": lambda: rounding.draws(1 << 16, 5, 1),
    "step": lambda: torch.cat([rounding.draws(1, t, 1) for t in range(4096)]),
    "state": lambda: torch.cat([rounding.draws(1, t, state) for t in range(256) for state in range(17)]),
}


@pytest.mark.parametrize("over", DRAWS)
def test_draws_are_uniform_and_unrelated(over):
    bits = DRAWS[over]()
    draws, deviation = bits.double() / 2**16, len(bits) ** -0.5
    assert abs(draws.mean() - 0.5) < 4 * deviation * 12**-0.5
    for lag in (1, 2, 3, 16, 17, 64):
        assert abs(torch.corrcoef(torch.stack([draws[:-lag], draws[lag:]]))[0, 1]) < 4 * deviation
    for bit in range(16):
        assert abs((bits >> bit & 1).double().mean() - 0.5) < 4 * deviation / 2


@pytest.mark.parametrize("rule", ops.OPERATORS)
@pytest.mark.parametrize("t", [0, 1, 2**40])
def test_kernels_and_reference_differ_in_few_roundings(kernels, rule, t):
    case = Case(rule, 2, [(100_003,), (64,)], [BRIEF] * 2, t=t)
    native, reference = case.native(), case.reference()
    assert_close(native, reference)
    # the draws are equal: only the last bits of float32 can change them
    for ours, theirs in zip(native[2:], reference[2:]):
        assert (ours != theirs).double().mean() < 1e-3


def test_a_permuted_state_is_rounded_in_the_order_of_memory(kernels):
    case = Case("adam", 2, [(2, 3, 4, 5)], [BRIEF])
    permute = lambda tensors: [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    case.x, case.g, case.u, case.v = permute(case.x), permute(case.g), permute(case.u), [permute(case.v[0])]
    native, reference = case.native(), case.reference()
    assert_close(native, reference)
    assert all((ours != theirs).sum() <= 1 for ours, theirs in zip(native[1:], reference[1:]))


def test_float32_and_bfloat16_states_in_one_call(kernels, emulated):
    case = Case("adam", 2, [(100,), (200,), (300,)], [FLOAT32, BRIEF, FLOAT32])
    assert_close(case.native(), case.reference())
    assert_same_bits(case.run(emulated.adam_), case.on("cpu").native())


def test_torch_accepts_bfloat16_states(kernels):
    case = Case("adopt", 2, [(10,), (2, 3)], [BRIEF] * 2)
    torch.library.opcheck(torch.ops.deslo.adopt_, (case.x, case.g, case.u, *case.v, []), case.numbers)


def give_gradients(params, step, rank=0):
    generator = torch.Generator().manual_seed(100 * step + rank)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_keeps_its_moments_in_bfloat16(dtype):
    settings = {
        "lr": 1e-2,
        "state_dtype": "bfloat16",
        "outer_optimizer": {"lr": 0.7},
        "sync_every": {"params": 3, "exp_avg": 2, "exp_avg_sq": 4},
    }

    def replica(average):
        params = [torch.nn.Parameter(torch.ones(70, dtype=dtype)), torch.nn.Parameter(torch.ones(3, 5, dtype=dtype))]
        optimizer = DesLoc(params, {"optimizer": {"params": settings}}, transport=average)
        for step in range(9):
            give_gradients(params, step, average.rank)
            optimizer.step()
        return params, optimizer

    for params, optimizer in threads(2, replica):
        for p in params:
            dtypes = {name: state.dtype for name, state in optimizer.state[p].items()}
            assert dtypes.pop("exp_avg") == dtypes.pop("exp_avg_sq") == torch.bfloat16
            assert dtypes.pop("step") == torch.int64
            assert dtypes.pop("origin") == torch.int64 and set(dtypes.values()) == {torch.float32} and p.dtype == dtype
        # the wire stays float32; a word asks after steps 2, 4, 8
        assert optimizer.stats.bytes["exp_avg"] == 4 * 4 * 85 + 3 * 4


def test_a_mean_lands_rounded_to_nearest():
    def replica(average):
        p = torch.nn.Parameter(torch.zeros(1000))
        params = {"state_dtype": "bfloat16", "sync_every": {"params": 1, "exp_avg": 1}}
        settings = {"optimizer": {"params": params}, "deslo": {"average_at": "after_step"}}
        optimizer = DesLoc([p], settings, transport=average)
        optimizer.state[p]["exp_avg"].fill_(1 if average.rank == 0 else 1 + 2**-7)
        optimizer.state[p]["exp_avg_sq"].fill_(1)  # such a momentum is held to nothing less
        optimizer.skip_step()
        return optimizer.state[p]["exp_avg"]

    for landed in threads(2, replica):
        assert (landed == 1).all()  # a tie, to even


def test_equal_replicas_stay_equal_and_a_resumed_run_is_the_straight_one():
    def run(average):
        params = [torch.nn.Parameter(torch.ones(70))]
        optimizer, saved = DesLoc(params, lr=1e-2, rule="adopt", state_dtype="bfloat16", sync_every={"params": 2}), None
        for step in range(8):
            give_gradients(params, step)
            if step == 5:
                saved = copy.deepcopy(optimizer.state_dict()), params[0].detach().clone()
            optimizer.step()
        again = [torch.nn.Parameter(saved[1])]
        other = DesLoc(again, lr=1e-2, rule="adopt", state_dtype="bfloat16", sync_every={"params": 2})
        other.load_state_dict(saved[0])
        for step in range(5, 8):
            give_gradients(again, step)
            other.step()
        assert torch.equal(again[0], params[0])
        assert torch.equal(other.state[again[0]]["exp_avg_sq"], optimizer.state[params[0]]["exp_avg_sq"])
        return params[0]

    one, other = threads(2, run)
    assert torch.equal(one, other)


def test_bfloat16_momenta_of_float64_parameters_are_refused():
    settings = {"optimizer": {"params": {"state_dtype": "bfloat16"}}, "deslo": {"wire_dtype": "float64"}}
    with pytest.raises(
        ConfigError, match="params.state_dtype: expected 'float32' with float64 parameters, got 'bfloat16'"
    ):
        DesLoc([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))], settings)
