"""``DesLoc`` as a torch optimizer: identities, param groups, dtypes, clocks, state dicts, broken gradients."""

import copy
import math

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc, NonFiniteError
from deslo_plugin.comm.transport import SingleReplica
from tests.support.worlds import threads

F64 = {"deslo": {"wire_dtype": "float64"}}


def params_of(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, step, rank=0):
    generator = torch.Generator().manual_seed(100 * step + rank)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def config(dtype_block=None, **params):
    return {"optimizer": {"params": params}, **(dtype_block or {})}


def test_alone_with_one_momentum_adam_is_torch_adamw():
    ours, theirs = params_of((4, 3), (5,), dtype=torch.float64), params_of((4, 3), (5,), dtype=torch.float64)
    one = DesLoc(ours, config(F64, lr=1e-2, betas=[0.9, 0.95], weight_decay=0.1))
    other = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(30):
        give_gradients(ours, step), give_gradients(theirs, step)
        one.step(), other.step()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(ours, theirs))


def test_alone_sgdm_is_momentum_in_average_form():
    ours, theirs = params_of((4, 3), dtype=torch.float64), params_of((4, 3), dtype=torch.float64)
    one = DesLoc(ours, config(F64, rule="sgdm", lr=1e-2, betas=[0.9]))
    other = torch.optim.SGD(theirs, lr=1e-2, momentum=0.9, dampening=0.9)
    for p in theirs:  # torch starts its buffer at g, not at (1 - beta) g
        other.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for step in range(30):
        give_gradients(ours, step), give_gradients(theirs, step)
        one.step(), other.step()
    assert torch.allclose(ours[0], theirs[0], rtol=0, atol=1e-14)


def test_a_group_has_its_own_rate_decay_and_periods():
    def replica(average):
        weights, bias = params_of((3,), (2,))
        groups = [{"params": [weights]}, {"params": [bias], "lr": 0.0, "sync_every": {"params": 2, "exp_avg_sq": None}}]
        landed = []
        optimizer = DesLoc(
            groups,
            config(lr=1e-2, sync_every={"params": 3}),
            transport=average,
            on_average=lambda event: landed.append((event.steps, event.bytes)),
        )
        for step in range(7):
            give_gradients([weights, bias], step, average.rank)
            optimizer.step()
        assert torch.equal(bias, params_of((3,), (2,))[1])
        return landed

    for landed in threads(2, replica):
        # 2 or 3 numbers, and the word by which replicas learn that none has written into them
        assert landed == [
            (2, {"params": 12}),
            (3, {"params": 16}),
            (4, {"params": 12}),
            (6, {"params": 16}),
            (6, {"params": 12}),
        ]


def test_a_misspelt_state_of_a_group_is_refused():
    with pytest.raises(ConfigError, match="param group 0.sync_every.exp_averag: .* did you mean 'exp_avg'"):
        DesLoc([{"params": params_of((3,)), "sync_every": {"exp_averag": 3}}], lr=1e-2)


@pytest.mark.parametrize(
    ("key", "own", "same"),
    [("betas", (0.8, 0.9), [0.9, 0.95]), ("eps", 1e-3, 1e-8), ("amsgrad", True, False), ("momentum", 0.5, 0.9)],
)
def test_numbers_of_a_group_that_would_not_count_are_refused(key, own, same):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    make = lambda value: DesLoc([{"params": params[:1], key: value}, {"params": params[1:]}], lr=1e-3)
    with pytest.raises(ConfigError, match=rf"param group 0.{key}: expected none: .* are one for all parameters.*, got"):
        make(own)
    assert len(make(same).param_groups) == 2


def test_parameters_without_gradient_age_and_average():
    def replica(average):
        trained, idle = params_of((3,), (2,))
        with torch.no_grad():
            idle.fill_(average.rank)
        optimizer = DesLoc([trained, idle], config(lr=1e-2, sync_every={"params": 2}), transport=average)
        for step in range(3):
            give_gradients([trained], step, average.rank)
            optimizer.step()
        return idle.detach().clone(), optimizer.state[idle]["step"].item(), optimizer.state[idle]["exp_avg"]

    for value, clock, momentum in threads(2, replica):
        assert torch.equal(value, torch.full((2,), 0.5)) and clock == 3 and not momentum.any()


def test_a_frozen_parameter_does_not_disturb_the_others():
    frozen, free = params_of((3,), (3,))
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = DesLoc([frozen, free], lr=1e-2, weight_decay=0.5)
    give_gradients([free], 0)
    optimizer.step()
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_states(dtype):
    low, high = params_of((64,), dtype=dtype), params_of((64,))
    one, other = DesLoc(low, lr=1e-3), DesLoc(high, lr=1e-3)
    with torch.no_grad():
        high[0].copy_(low[0])
    for step in range(5):
        give_gradients(low, step)
        high[0].grad = low[0].grad.float()
        one.step(), other.step()
        assert torch.equal(one.state[low[0]]["exp_avg"], other.state[high[0]]["exp_avg"])
        with torch.no_grad():
            high[0].copy_(low[0])
    assert one.state[low[0]]["exp_avg_sq"].dtype == torch.float32
    assert low[0].dtype == dtype


def test_float64_parameters_need_a_float64_wire():
    with pytest.raises(ConfigError, match="deslo.wire_dtype: expected 'float64' for float64 parameters"):
        DesLoc(params_of((3,), dtype=torch.float64), lr=1e-2)


def test_state_dict_round_trip_changes_no_bit_and_keeps_the_configs_periods():
    settings = config(
        lr=1e-2, sync_every={"params": 2}, momenta=[{"beta": 0.9, "weight": 0.5}, {"beta": 0.99, "weight": 0.5}]
    )
    straight = params_of((4,), dtype=torch.bfloat16)
    one = DesLoc(straight, settings)
    for step in range(5):
        give_gradients(straight, step)
        one.step()
    saved, values = copy.deepcopy(one.state_dict()), [p.detach().clone() for p in straight]

    again = [torch.nn.Parameter(value) for value in values]
    other = DesLoc(again, config(lr=1e-2, sync_every={"params": 3}, momenta=settings["optimizer"]["params"]["momenta"]))
    other.load_state_dict(saved)
    assert other.param_groups[0]["sync_every"]["params"] == 3
    for step in range(5, 9):
        give_gradients(straight, step), give_gradients(again, step)
        one.step(), other.step()
    assert torch.equal(straight[0], again[0])
    for state in ("exp_avg", "exp_avg_2", "exp_avg_sq"):
        assert torch.equal(one.state[straight[0]][state], other.state[again[0]][state])


def test_loading_drops_an_average_in_flight():
    def replica(average):
        params = params_of((3,))
        optimizer = DesLoc(params, config(lr=1e-2, sync_every={"params": 2}), transport=average)
        saved = None
        for step in range(2):
            give_gradients(params, step, average.rank)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())  # the average of step 2 is in flight here
        with torch.no_grad():
            params[0].fill_(10.0 * average.rank)
        optimizer.load_state_dict(saved)
        params[0].grad = torch.zeros(3)
        optimizer._update = optimizer._tick  # nothing but the average
        optimizer.step()
        return params[0].detach().clone()

    assert all(torch.equal(value, torch.full((3,), 5.0)) for value in threads(2, replica))


def test_a_closure_is_evaluated_with_gradients():
    (weights,) = params_of((3,))
    optimizer = DesLoc([weights], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = weights.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_value_clipping_bounds_each_coordinate_and_does_not_hide_infinity():
    (weights,) = params_of((3,))
    optimizer = DesLoc([weights], rule="sgdm", lr=1.0, betas=[0.0], clip_value=0.5)
    before = weights.detach().clone()
    weights.grad = torch.tensor([0.2, -7.0, 7.0])
    optimizer.step()
    assert torch.allclose(before - weights, torch.tensor([0.2, -0.5, 0.5]))
    weights.grad = torch.tensor([0.2, math.inf, 0.0])
    optimizer.step()
    assert weights.isnan().tolist() == [False, True, False]


def broken_at(policy, when):
    def replica(average):
        params = params_of((3,))
        settings = config({"deslo": {"on_nonfinite": policy, "average_at": when}}, lr=1e-2, sync_every={"params": 4})
        optimizer = DesLoc(params, settings, transport=average)
        for step in range(6):
            give_gradients(params, step, average.rank)
            if (average.rank, step) == (1, 1):
                params[0].grad[0] = math.nan
            try:
                optimizer.step()
            except NonFiniteError as error:
                return step, str(error), params[0].isfinite().all().item()
        return None, optimizer.stats.skipped_steps, params[0].isfinite().all().item()

    return threads(3, replica)


@pytest.mark.parametrize(("when", "step"), [("before_step", 4), ("after_step", 3)])
def test_nan_stops_every_replica_at_the_same_average_and_is_not_written(when, step):
    results = broken_at("stop", when)
    assert [at for at, _, _ in results] == [step] * 3
    assert all("got NaN or inf from rank(s) [1]; nothing was written" in message for _, message, _ in results)
    assert [finite for _, _, finite in results] == [True, False, True]


def test_nan_is_skipped_where_asked():
    assert broken_at("skip", "before_step") == [(None, 0, True), (None, 1, True), (None, 0, True)]


def test_adopt_that_skips_its_first_step_still_sets_its_second_moment_from_a_gradient():
    def replica(average):
        params = params_of((3,))
        settings = config({"deslo": {"on_nonfinite": "skip"}}, rule="adopt", lr=1e-2)
        optimizer = DesLoc(params, settings, transport=average)
        for step in range(2):
            give_gradients(params, step)
            gradient = params[0].grad.clone()
            if step == 0:
                params[0].grad.fill_(math.nan)
            optimizer.step()
        return optimizer.state[params[0]]["exp_avg_sq"], gradient.square()

    ours, theirs = threads(1, replica)[0]
    assert torch.equal(ours, theirs)


def test_k_256_768_1536_moves_170_times_less_than_synchronous():
    def replica(average):
        params = params_of((4096,))
        optimizer = DesLoc(
            params, config(lr=1e-3, sync_every={"params": 256, "exp_avg": 768, "exp_avg_sq": 1536}), transport=average
        )
        for step in range(1537):
            params[0].grad = torch.ones(4096)
            optimizer.step()
        return sum(average.sent), sum(optimizer.stats.bytes.values())

    for sent, counted in threads(2, replica):
        synchronous = 1536 * 4096 * 4
        assert sent == counted and synchronous / sent == pytest.approx(170.67, abs=0.05)


def test_config_and_keyword_arguments_together_are_refused():
    with pytest.raises(ConfigError, match="expected a config or keyword arguments, got both"):
        DesLoc(params_of((3,)), {"optimizer": {}}, lr=1e-3)


def test_an_unarmed_optimizer_does_nothing():
    (weights,) = params_of((3,))
    optimizer, before = DesLoc([weights], lr=1e-2, armed=False), weights.detach().clone()
    give_gradients([weights], 0)
    optimizer.step()
    optimizer.skip_step()
    assert torch.equal(weights, before) and not optimizer.state


@pytest.mark.parametrize("config", [None, {"optimizer": {"params": {"lr": 0.1}}}])
def test_the_old_name_of_the_transport_says_the_new_one(config):
    with pytest.raises(ConfigError, match=r"DesLoc\(average=...\): expected transport=..., got its old name"):
        DesLoc([torch.nn.Parameter(torch.ones(2))], config, average=SingleReplica())
