"""What torch asks of the operators: opcheck, one graph under torch.compile, version counters."""

import pytest
import torch
from test_native import FLOAT32, Case

from deslo_plugin import ops


def test_torch_accepts_the_operators(kernels):
    case = Case("adam", 1, [(10,), (2, 3)], [FLOAT32] * 2)
    torch.library.opcheck(torch.ops.deslo.adam_, (case.x, case.g, case.u, *case.v, []), case.numbers)
    case = Case("sgdm", 2, [(10,)], [FLOAT32])
    torch.library.opcheck(torch.ops.deslo.sgdm_, (case.x, case.g, case.u, []), case.numbers)


def test_a_compiled_step_is_one_graph(kernels):
    case = Case("adam", 1, [(10,)], [FLOAT32])

    def step(x, g, u, v):
        ops.adam_(x, [2 * each for each in g], [u], v, **case.numbers)
        return x[0] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = ([t.clone() for t in case.x] for _ in range(2))
    clones = lambda: ([t.clone() for t in case.g], [t.clone() for t in case.u], [t.clone() for t in case.v[0]])  # noqa: E731
    assert torch.equal(step(eager, *clones()), compiled(traced, *clones()))
    assert torch.equal(eager[0], traced[0])


def test_backward_notices_that_params_have_moved():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    ops.sgdm_([p], [torch.ones(3)], [[torch.zeros(3)]], t=0, lr=0.1, weight_decay=0.0, betas=[0.9], weights=[1.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
