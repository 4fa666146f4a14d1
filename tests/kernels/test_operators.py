"""What torch asks of the operators: opcheck, one graph under torch.compile, version counters, step and rate as
tensors."""

import pytest
import torch

from deslo_plugin import DesLoc
from deslo_plugin.kernels import update as ops
from tests.support.cases import BRIEF, FLOAT32, MIXED, Case, assert_close, assert_same_bits
from tests.support.device import ON_CPU

# a GPU forms factors by its own pow and division: to one rounding, says the operators' docstring
near = assert_same_bits if ON_CPU else assert_close


def in_tensors(case, *names):
    """The same case, with t and lr (or only one of them) in tensors, and numbers that would be wrong beside them."""
    wide = {"t": (torch.int64, 77), "lr": (torch.float64, 7.0)}
    for name in names or wide:
        dtype, wrong = wide[name]
        case.numbers |= {f"{name}_tensor": torch.tensor(case.numbers[name], dtype=dtype), name: wrong}
    return case


def test_torch_accepts_the_operators(kernels):
    case = Case("adam", 1, [(10,), (2, 3)], [FLOAT32] * 2)
    torch.library.opcheck(torch.ops.deslo.adam_, (case.x, case.g, case.u, *case.v, []), case.numbers)
    case = Case("sgdm", 2, [(10,)], [FLOAT32])
    torch.library.opcheck(torch.ops.deslo.sgdm_, (case.x, case.g, case.u, []), case.numbers)
    case = in_tensors(Case("adopt", 1, [(10,)], [FLOAT32]))
    torch.library.opcheck(torch.ops.deslo.adopt_, (case.x, case.g, case.u, *case.v, []), case.numbers)


def test_a_compiled_step_is_one_graph(kernels):
    case = Case("adam", 1, [(10,)], [FLOAT32])

    def step(x, g, u, v):
        ops.adam_(x, [2 * each for each in g], [u], v, **case.numbers)
        return x[0] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = ([t.clone() for t in case.x] for _ in range(2))
    clones = lambda: ([t.clone() for t in case.g], [t.clone() for t in case.u], [t.clone() for t in case.v[0]])
    assert torch.equal(step(eager, *clones()), compiled(traced, *clones()))
    assert torch.equal(eager[0], traced[0])


def test_backward_notices_that_params_have_moved():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    ops.sgdm_([p], [torch.ones(3)], [[torch.zeros(3)]], t=0, lr=0.1, weight_decay=0.0, betas=[0.9], weights=[1.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("names", [("t",), ("lr",), ("t", "lr")], ids="+".join)
@pytest.mark.parametrize("t", [0, 1, 1000])
@pytest.mark.parametrize("rule", ops.OPERATORS)
def test_step_and_rate_may_be_tensors(kernels, emulated, rule, t, names):
    types = [FLOAT32, *BRIEF][: len(MIXED)]
    for options in (
        {},
        {"found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(0.5)},
        {"found_inf": torch.tensor(1.0)},
    ):
        by_value = Case(rule, 2, MIXED, types, t=t, **options)
        by_tensor = in_tensors(Case(rule, 2, MIXED, types, t=t, **options), *names)
        near(by_tensor.native(), by_value.native())
        near(by_tensor.run(getattr(emulated, f"{rule}_")), by_value.native())
        assert_same_bits(by_tensor.reference(), by_value.reference())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_functions_take_tensors_of_any_real_dtype(shape):
    updated = []
    step, rate = torch.full(shape, 3), torch.full(shape, 0.25)
    for t, lr in ((3, 0.25), (step.float(), rate), (step, rate.double())):
        case = Case("adopt", 1, [(10,)], [FLOAT32])
        ops.adopt_(case.x, case.g, [case.u], *case.v, **case.numbers | {"t": t, "lr": lr})
        updated.append([*case.x, *case.u, *case.v[0]])
    assert_same_bits(updated[1], updated[0])
    assert_same_bits(updated[2], updated[0])


def test_a_compiled_step_follows_a_rate_in_a_tensor(kernels):
    case, graphs = Case("sgdm", 1, [(10,)], [FLOAT32]), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, g, u, lr):
        ops.sgdm_([x], [g], [[u]], **case.numbers | {"lr": lr})

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for rate in (0.1, 0.2):
        eager, traced = [[tensor.clone() for tensor in (case.x[0], case.g[0], case.u[0])] for _ in range(2)]
        step(*eager, rate)
        compiled(*traced, torch.tensor(rate, dtype=torch.float64))
        assert_same_bits(traced, eager)
    assert len(graphs) == 1


BAD = {
    "t: expected one int64 number, got shape \\[\\]": {"t_tensor": torch.tensor(1.0)},
    "t: expected one int64 number, got shape \\[2\\]": {"t_tensor": torch.tensor([1, 2])},
    "lr: expected one float64 number, got shape \\[\\]": {"lr_tensor": torch.tensor(0.1)},
}


@pytest.mark.parametrize("message", BAD)
def test_tensors_that_are_no_number_are_refused(kernels, message):
    case = Case("adam", 1, [(4,)], [FLOAT32], **BAD[message])
    for update in (case.native, case.reference):
        with pytest.raises(ValueError, match=f"^deslo: {message}"):
            update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimizer_takes_a_rate_in_a_tensor_that_a_schedule_changes(dtype):
    numbers, tensors = (DesLoc([torch.nn.Parameter(torch.ones(10))], weight_decay=0.1) for _ in range(2))
    tensors.param_groups[0]["lr"] = torch.tensor(0.0, dtype=dtype)
    for rate in (0.5, 0.25, 0.0):
        numbers.param_groups[0]["lr"] = rate
        tensors.param_groups[0]["lr"].fill_(rate)
        for optimizer in (numbers, tensors):
            optimizer.param_groups[0]["params"][0].grad = torch.linspace(-1, 1, 10)
            optimizer.step()
    assert torch.equal(numbers.param_groups[0]["params"][0], tensors.param_groups[0]["params"][0])
