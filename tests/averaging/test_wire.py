"""States that travel in few bits: how far a mean may be off, what is never lost, and what each option does with it."""

from dataclasses import replace

import pytest
import torch

from deslo_plugin import ConfigError, DesLoc, NonFiniteError, load_config
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.kernels.quantize import BLOCK, FORMATS, ROOTED, decode
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager
from deslo_plugin.optim.any_optimizer_step import schedule
from deslo_plugin.planning.plan import make_plan
from deslo_plugin.simulation.row_mean import RowMean
from tests.support.oracle import Setting, blocks
from tests.support.quadratic import noisy_quadratic
from tests.support.worlds import threads

SHAPES = [(300,), (7, 33), (), (0, 4), (129,)]
MIXED = {"wire_dtype": {"params": "int4", "exp_avg": "int8", "exp_avg_sq": "float8"}}


def random(replicas, seed, shapes=SHAPES):
    """Values of many magnitudes, a row for each replica."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(replicas, *shape, generator=generator)
    return [draw(shape) * draw(shape).exp() for shape in shapes]


def mean_of(values, format, bases=(), errors=(), weight=None):
    """What lands of ``values``, and what was sent and gathered."""
    bucket, work = RowMean(len(values[0])).start_quantized(values, list(bases), list(errors), format, weight)
    work.wait()
    return bucket


def quanta(records, format):
    """How far a value may be from what its record says: (blocks, BLOCK)."""
    if format.bits == 16:
        return decode(records, format).abs() * 2**-8
    scale = records[:, :4].contiguous().view(torch.float32)
    if format.levels == 448:  # half of what lies between neighbours, of which the smallest are 2^-9 apart
        root = decode(records, format).abs().sqrt() if format.rooted else decode(records, format).abs()
        step = torch.maximum(root * 2**-4, scale * 2**-10)
    else:
        root, step = decode(records, format).abs().sqrt(), (scale / 2).expand(-1, BLOCK)
    return step * (2 * root + step) * 1.01 + (scale**2 if format.rooted else 0) if format.rooted else step * 1.001


@pytest.mark.parametrize("replicas", [2, 3, 5])
@pytest.mark.parametrize("name, formats", [(name, each) for each in (FORMATS, ROOTED) for name in FORMATS])
def test_the_mean_is_half_a_quantum_from_the_true_one(name, formats, replicas):
    """Half of one of what each replica sent, but for the one that takes the mean, and half of one of the mean."""
    format = formats[name]
    values = [each.square() if format.rooted else each for each in random(replicas, 0)]
    bucket = mean_of(values, format)
    sent = torch.stack([quanta(row.sent.flatten(0, 2), format) for row in bucket.rows])
    part = bucket.rows[0].sent.shape[2]
    for replica in range(replicas):
        sent[replica, replica * part : (replica + 1) * part] = 0  # its own is not rounded
    allowed = sent.mean(0) + quanta(bucket.rows[0].gathered.flatten(0, 2), format)
    block = 0
    for value, landed in zip(values, bucket.views):
        blocks = -(-value[0].numel() // 128)
        bound = allowed[block : block + blocks].flatten()[: value[0].numel()].view(value[0].shape)
        true = value.double().mean(0)
        assert all(torch.equal(row, landed[0]) for row in landed)
        assert ((landed[0] - true).abs() <= bound + 1e-6 * true.abs()).all()
        block += blocks


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_lost_over_a_thousand_averages(name):
    """What has landed and what is still owed, on average over replicas, is what was sent."""
    shapes, replicas = [(300,)], 3
    (errors,) = owed = [torch.zeros(replicas, 300)]
    landed, sent = torch.zeros(300, dtype=torch.float64), torch.zeros(300, dtype=torch.float64)
    for step in range(1000):
        (value,) = random(replicas, step % 50, shapes)
        bucket = mean_of([value], FORMATS[name], errors=owed)
        sent += value.double().mean(0)
        landed += bucket.views[0][0]
        bucket.carry([0])
    assert torch.allclose(landed + errors.double().mean(0), sent, rtol=0, atol=2e-3)  # a thousand sums in float32
    assert errors.abs().max() < 30  # while values are up to 60


def optimizer_of(average, config, size=40):
    start = torch.linspace(-1, 1, size)
    params = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start[:12].clone().view(3, 4))]
    return params, DesLoc(params, config, transport=average)


def take_steps(optimizer, params, rank, steps):
    for step in steps:
        for param in params:
            param.grad = noisy_quadratic(rank, step, param.detach()) if param.requires_grad else None
        if optimizer.averaging.samples.wanted:
            optimizer.averaging.samples.record_samples(1.0 + rank)
        optimizer.step()


S = Setting("adam", {"x": 3, "u1": 3, "v": 6}, [0.9], [1.0], after_update=True)


@pytest.mark.parametrize("change", [{}, {"replica_weights": "samples"}], ids=str)
@pytest.mark.parametrize("wire", ["bfloat16", "float8", "int8", MIXED["wire_dtype"]], ids=str)
def test_replicas_are_equal_after_an_average_and_near_those_of_float32(wire, change):
    def replica(average, wire):
        params, optimizer = optimizer_of(average, blocks(S, wire_dtype=wire, **change))
        take_steps(optimizer, params, average.rank, range(12))
        return [p.detach() for p in params] + [optimizer.state[p]["exp_avg_sq"] for p in params]

    ours, theirs = (threads(3, lambda average, wire=wire: replica(average, wire)) for wire in (wire, "float32"))
    for mine in ours:
        assert all(map(torch.equal, mine, ours[0]))
        for x, y in zip(mine[:2], theirs[0][:2]):
            assert (x - y).abs().max() < 1e-2


@pytest.mark.parametrize("change", [{}, {"fragments": 2}], ids=str)
def test_a_frozen_parameter_joins_later(change):
    """All that is sent as a difference begins at what all replicas hold, also where one began to train before."""

    def replica(average):
        params, optimizer = optimizer_of(average, blocks(S, **MIXED, **change))
        params[1].requires_grad_(False)
        take_steps(optimizer, params, average.rank, range(6))
        params[1].requires_grad_()
        take_steps(optimizer, params, average.rank, range(6, 12))
        return [p.detach() for p in params], [optimizer.state[p]["params_common"] for p in params]

    results = threads(3, replica)
    for params, common in results:
        assert all(map(torch.equal, common, results[0][1]))
        if not change:
            assert all(map(torch.equal, params, results[0][0])) and all(map(torch.equal, params, common))


def test_nan_of_one_element_stops_every_replica():
    def replica(average):
        params, optimizer = optimizer_of(average, blocks(S, wire_dtype="int4"))
        take_steps(optimizer, params, average.rank, range(2))
        with torch.no_grad():
            params[0][17] = float("nan") if average.rank == 1 else 0.0
        before = params[1].detach().clone()
        with pytest.raises(NonFiniteError, match=r"got NaN or inf from rank\(s\) \[1\]"):
            take_steps(optimizer, params, average.rank, [2])
        return before

    threads(3, replica)


def test_one_replica_alone_rounds_nothing():
    states = []
    for wire in ("float32", "int4"):
        params, optimizer = optimizer_of(None, blocks(S, wire_dtype=wire))
        take_steps(optimizer, params, 0, range(7))
        states.append([p.detach() for p in params])
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("deslo", [{}, {"replica_weights": "samples"}, {"fragments": 3}], ids=str)
def test_bytes_are_as_planned(deslo):
    s = replace(S, after_update=False, periods={"x": 4, "u1": 4, "v": 8})

    def replica(average):
        params, optimizer = optimizer_of(average, blocks(s, **MIXED, **deslo), size=700)
        take_steps(optimizer, params, average.rank, range(17))
        averaging = optimizer.averaging
        from deslo_plugin.averaging.cohort import Cohort

        cuts = [averaging.fragments.numels(Cohort(0, group, group["params"], {})) for group in averaging.groups]
        periods = [group["sync_every"] for group in optimizer.param_groups]
        plan = make_plan(optimizer.config, [712], periods, contiguous(2, 0, 1), cuts=cuts)
        planned = {state: sum(plan.bytes_at(t).get(state, 0) for t in range(1, 17)) for state in optimizer.stats.bytes}
        assert optimizer.stats.bytes == planned
        return sum(planned.values())

    assert len(set(threads(2, replica))) == 1


@pytest.mark.parametrize(
    "deslo, said",
    [
        ({"wire_dtype": "int5"}, "wire_dtype: expected one of float32, float64, bfloat16, float8, int8, int4"),
        ({"wire_dtype": {"params": "float64"}}, "wire_dtype.params: expected one of float32, bfloat16"),
        ({"wire_dtype": {"exp_avgs": "int8"}}, "wire_dtype.exp_avgs: expected a state that averages .*did you mean"),
        ({"wire_dtype": {1: "int8"}}, "wire_dtype.1: expected a state that averages .*remove it"),
        ({"wire_feedback": ["params"]}, r"wire_feedback: expected states that travel in few bits \(none here\)"),
        ({"wire_dtype": "int8", "wire_difference": ["exp_avg_sq"]}, "expected states that may be negative"),
        ({"wire_dtype": "int8", "wire_difference": "params"}, 'wire_difference: expected "auto" or a list of states'),
    ],
)
def test_what_cannot_be_meant_is_refused(deslo, said):
    with pytest.raises(ConfigError, match=said):
        load_config({"optimizer": {"params": {}}, "deslo": deslo})


def test_a_root_of_a_difference_is_not_rounded():
    """Centred RMSprop's: of a constant gradient int8 made it NaN after 32 steps."""
    every = {"params": 2, "square_avg": 2, "grad_avg": 2}
    with pytest.raises(ConfigError, match="wire_dtype of square_avg: expected float32 for square_avg and grad_avg"):
        load_config({"deslo": {"sync_every": every, "wire_dtype": "int8"}})
    load_config({"deslo": {"sync_every": every, "wire_dtype": {"params": "int8"}}})


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("feedback", ["auto", ["params", "row_var", "variance"]], ids=str)
def test_a_state_of_another_shape_than_its_parameter(feedback, fragments):
    """Adafactor's rows and columns, which are there after the first step only, and are never below zero."""
    deslo = {"sync_every": {"params": 2, "row_var": 4, "col_var": 4, "variance": 4}, "wire_dtype": "int4"}
    deslo |= {"wire_feedback": feedback, "fragments": fragments, "average_at": "after_step"}

    def replica(average):
        params = [torch.nn.Parameter(torch.ones(7, 33)), torch.nn.Parameter(torch.ones(40))]
        optimizer = torch.optim.Adafactor(params)
        schedule(AnyOptimizerAverager(optimizer, load_config({"deslo": deslo}).deslo, average))
        for step in range(8):
            for param in params:
                param.grad = noisy_quadratic(average.rank, step, param.detach())
            optimizer.step()
        states = [value for param in params for name, value in optimizer.state[param].items() if name != "step"]
        assert all((value >= 0).all() for value in states)
        return [param.detach() for param in params] + states

    ours = threads(3, replica)
    assert fragments > 1 or all(map(torch.equal, ours[0], ours[1]))
    assert all(value.isfinite().all() for value in ours[0])


def test_a_state_that_never_averages_has_no_format():
    config = {"optimizer": {"params": {"sync_every": {"params": 4, "exp_avg": None, "exp_avg_sq": None}}}}
    assert load_config(config | {"deslo": {"wire_dtype": "int8"}}).deslo.wire.difference == ("params",)
    with pytest.raises(ConfigError, match="expected a state that averages .*got one that does not"):
        load_config(config | {"deslo": {"wire_dtype": {"exp_avg": "int8"}}})


@pytest.mark.parametrize("trains_late", [False, True])
def test_differences_begin_where_the_warm_up_ends(trains_late):
    """Synchronous steps leave replicas equal: what they hold then need not be sent."""

    def replica(average):
        params, optimizer = optimizer_of(average, blocks(S, wire_dtype="int4", synchronous_steps=5))
        params[1].requires_grad_(not trains_late)
        for step in range(9):
            params[1].requires_grad_(not trains_late or step > 3)
            rank = 0 if step < 5 else average.rank  # gradients of a warm-up are alike
            take_steps(optimizer, params, rank, [step])
            if step == 4:
                start = [p.detach().clone() for p in params[: 1 if trains_late else 2]]
                common = [optimizer.state[p]["params_common"].clone() for p in params[: len(start)]]
        return start, common, [p.detach() for p in params[:1]]

    results = threads(2, replica)
    for start, common, end in results:
        assert all(map(torch.equal, start, common)) and all(map(torch.equal, end, results[0][2]))


def test_without_few_bits_nothing_is_kept_for_them():
    def replica(average):
        params, optimizer = optimizer_of(average, blocks(S))
        take_steps(optimizer, params, average.rank, range(4))
        return sorted(optimizer.state[params[0]])

    assert threads(2, replica) == [["exp_avg", "exp_avg_sq", "origin", "step"]] * 2
