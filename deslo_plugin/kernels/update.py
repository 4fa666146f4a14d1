"""The update rules as operators, ``torch.ops.deslo.{sgdm_,adam_,adopt_}``: one pass over memory where kernels exist.

The schema and the meaning of each operator are here, the meaning as a reference made of ``rules.py``. The native module
``deslo_plugin._C``, if it was built, adds implementations for CPU and CUDA tensors. All of them

- take params, gradients and copies in float32, bfloat16 or float16 with float32 or bfloat16 momenta, mixed as the model
has
  them, or all in float64, and compute in float32 or float64;
- round new values of bfloat16 momenta at random (``rounding.py``), of everything else to nearest;
- multiply gradients by ``grad_scale``, then clip them to [-clip_value, clip_value], and write nothing if ``found_inf``
  is not 0 (both 0-dim float32 on the params' device);
- write the new params into ``copy`` too, if it is given: ZeRO's 16-bit weights;
- take ``t`` and ``lr`` as numbers, or as tensors of one element (any real dtype) on the params' device. CUDA kernels
read those
  there, so that the host does not wait and a CUDA graph that captured the call uses their values at replay. Bias
  corrections and ADOPT's t^(1/4) are formed in float64 on either side; on the CPU results are those of the numbers, on
  CUDA within one rounding of such a factor (2^-23 of a float32 update);
- want tensors of one position in one shape and in one dense layout, contiguous or permuted, and no two written tensors
  on the same memory. They raise ``ValueError`` naming the argument, before anything is written.

The native kernels flush subnormal numbers to zero. Their results do not depend on the number of threads nor, bit for
bit, on the instruction set.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor

from deslo_plugin.algorithm.rules import RULES, Rule, Tensors, clipped
from deslo_plugin.algorithm.stochastic_rounding import round_
from deslo_plugin.kernels import availability
from deslo_plugin.kernels.argument_checks import refuse, refuse_overlap
from deslo_plugin.kernels.availability import settle
from deslo_plugin.kernels.local_tensors import local

MAX_MOMENTA = 16

_TENSORS = {
    "x": "Tensor(a!)[] x",
    "g": "Tensor[] g",
    "u": "Tensor(b!)[] u",
    "v": "Tensor(c!)[] v",
    "copy": "Tensor(d!)[] copy",
}
_NUMBERS = "int t, float lr, float weight_decay, float[] betas, float[] weights"
_OPTIONS = (
    "float? clip_value=None, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? t_tensor=None, "
    "Tensor? lr_tensor=None"
)
_SCALARS = {"t": torch.int64, "lr": torch.float64}  # numbers that may be tensors

_library = torch.library.Library("deslo", "DEF")


native = availability.native


def sgdm_(x: Tensors, g: Tensors, u: Sequence[Tensors], *, copy: Tensors = (), **numbers: Any) -> None:
    """``rules.sgdm_`` as one operator, with the options of the module's docstring."""
    _call("sgdm_", x, g, u, copy=copy, **numbers)


def adam_(x: Tensors, g: Tensors, u: Sequence[Tensors], v: Tensors, *, copy: Tensors = (), **numbers: Any) -> None:
    """``rules.adam_`` as one operator, with the options of the module's docstring."""
    _call("adam_", x, g, u, v, copy=copy, **numbers)


def adopt_(x: Tensors, g: Tensors, u: Sequence[Tensors], v: Tensors, *, copy: Tensors = (), **numbers: Any) -> None:
    """``rules.adopt_`` as one operator, with the options of the module's docstring."""
    _call("adopt_", x, g, u, v, copy=copy, **numbers)


OPERATORS: Mapping[str, Callable[..., None]] = {"sgdm": sgdm_, "adam": adam_, "adopt": adopt_}


def _call(name: str, x: Tensors, g: Tensors, u: Sequence[Tensors], *v: Tensors, copy: Tensors, **numbers: Any) -> None:
    for scalar, dtype in _SCALARS.items():
        if isinstance(numbers[scalar], Tensor):
            numbers |= {scalar: 0, f"{scalar}_tensor": numbers[scalar].to(dtype)}
    lists = map(local, (x, g, list(chain.from_iterable(u)), *v, copy))
    if not torch.compiler.is_compiling():
        settle(x[:1])
    getattr(torch.ops.deslo, name)(*lists, **numbers)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([*x, *copy])  # a backward through old values must notice


def reference(rule: str) -> Callable[..., None]:
    """The operator made of torch's own, with the same arguments: checks, casts, and the rule of ``rules.py``."""

    def update(
        x: Tensors,
        g: Tensors,
        u: Tensors,
        *more: Tensors,
        t: int,
        lr: float,
        betas: Sequence[float],
        weights: Sequence[float],
        clip_value: float | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        t_tensor: Tensor | None = None,
        lr_tensor: Tensor | None = None,
        **numbers: Any,
    ) -> None:
        *v, copy = more
        scalars = {"grad_scale": grad_scale, "found_inf": found_inf, "t": t_tensor, "lr": lr_tensor}
        _check(x, g, u, v, copy, betas, weights, clip_value, scalars)
        settle(x[:1])
        t, lr = t if t_tensor is None else cast(int, t_tensor.item()), lr if lr_tensor is None else lr_tensor.item()
        if found_inf is not None and found_inf.item():
            return
        momenta = [u[j * len(x) : (j + 1) * len(x)] for j in range(len(betas))]
        wide_x, wide_g, *wide_v = (_wide(tensors, u) for tensors in (x, g, *v))
        wide_momenta = [_wide(u_j, u) for u_j in momenta]
        if grad_scale is not None:
            wide_g = [grad * grad_scale.to(grad.dtype) for grad in wide_g]
        if clip_value is not None:
            wide_g = clipped(wide_g, clip_value)
        RULES[rule].update(wide_x, wide_g, wide_momenta, *wide_v, t=t, lr=lr, betas=betas, weights=weights, **numbers)
        for target, value in zip([*x, *copy], [*wide_x, *(wide_x if copy else [])]):
            if target is not value:
                target.copy_(value)
        for state, (targets, values) in enumerate(zip([*v, *momenta], [*wide_v, *wide_momenta]), start=1 - len(v)):
            for target, value in zip(targets, values):
                if target is not value:
                    round_(target, value, t, state)

    return update


def _wide(tensors: Tensors, states: Tensors) -> Tensors:
    """Tensors in the dtypes that ``states`` are computed in; the tensors themselves where they have it."""
    return [
        tensor.to(torch.float64 if s.dtype == torch.float64 else torch.float32) for tensor, s in zip(tensors, states)
    ]


def _check(
    x: Tensors,
    g: Tensors,
    u: Tensors,
    v: Sequence[Tensors],
    copy: Tensors,
    betas: Sequence[float],
    weights: Sequence[float],
    clip_value: float | None,
    scalars: Mapping[str, Tensor | None],
) -> None:
    """What csrc/torch/update_checks.h refuses, in its words."""
    if not 1 <= len(betas) <= MAX_MOMENTA:
        refuse(f"betas: expected 1 to {MAX_MOMENTA} momenta, got {len(betas)}")
    if len(weights) != len(betas):
        refuse(f"weights: expected {len(betas)} as there are betas, got {len(weights)}")
    if clip_value is not None and not clip_value > 0:
        refuse(f"clip_value: expected a number > 0, got {clip_value:g}")
    if not x:
        refuse("x: expected one tensor or more, got an empty list")
    lists = {"g": g, **({"v": v[0]} if v else {}), "u": u, **({"copy": copy} if copy else {})}
    for name, tensors in lists.items():
        expected = len(x) * (len(betas) if name == "u" else 1)
        if len(tensors) != expected:
            refuse(f"{name}: expected {expected} tensors, got {len(tensors)}")
    for name, number in scalars.items():
        if number is None:
            continue
        if number.device != x[0].device:
            refuse(f"{name}: expected the device of x[0], got another")
        dtype = _SCALARS.get(name, torch.float32)
        if number.dtype != dtype or number.numel() != 1:
            refuse(f"{name}: expected one {str(dtype).removeprefix('torch.')} number, got shape {list(number.shape)}")

    lists = {"x": x, **lists}
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            _check_tensor(
                f"{name}[{index}]", tensor, x[index % len(x)], index % len(x), u[index % len(x)].dtype, x[0].device
            )
    refuse_overlap(lists, written=lists.keys() - {"g"})


def _check_tensor(name: str, tensor: Tensor, x: Tensor, i: int, state: torch.dtype, device: torch.device) -> None:
    dtype, wanted = (str(each).removeprefix("torch.") for each in (tensor.dtype, state))
    if tensor.layout != torch.strided:
        refuse(f"{name}: expected a dense tensor, got {tensor.layout}")
    if name[0] in "uv":
        if state not in (torch.float32, torch.float64, torch.bfloat16):
            why = "; squares of gradients vanish in it" if state == torch.float16 else ""
            refuse(f"u[{i}]: expected float32, float64 or bfloat16, got {wanted}{why}")
        if tensor.dtype != state:
            refuse(f"{name}: expected {wanted} as u[{i}] is, got {dtype}")
    elif state == torch.float64 and tensor.dtype != torch.float64:
        refuse(f"{name}: expected float64 with float64 momenta, got {dtype}")
    elif state != torch.float64 and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        refuse(f"{name}: expected float32, bfloat16 or float16 with {wanted} momenta, got {dtype}")
    if tensor.device != device:
        refuse(f"{name}: expected the device of x[0], got another")
    if tensor.shape != x.shape:
        refuse(f"{name}: expected shape {list(x.shape)} of x[{i}], got {list(tensor.shape)}")
    if not _is_dense(tensor):
        refuse(f"{name}: expected a contiguous (or densely strided) tensor")
    if any(a != b for a, b, size in zip(tensor.stride(), x.stride(), x.shape) if size > 1):
        refuse(f"{name}: expected strides {list(x.stride())} of x[{i}], got {list(tensor.stride())}")


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, in whatever order of dimensions."""
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    ends = accumulate((size for _, size in dims), mul, initial=1)
    return tensor.numel() == 0 or all(stride == end for (stride, _), end in zip(dims, ends))


def _define() -> None:
    for name, rule in RULES.items():
        if rule.of_matrices:
            continue  # ``matrices.py``
        tensors = [schema for letter, schema in _TENSORS.items() if letter != "v" or rule.has_second_moment]
        numbers = [part for part in (_NUMBERS, _second_moment(rule), _OPTIONS) if part]
        availability.define(_library, f"{name}_({', '.join(tensors)}, *, {', '.join(numbers)}) -> ()", reference(name))
        # an update is nothing to differentiate: autograd would look at every tensor on the way
        _library.impl(f"{name}_", torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"deslo::{name}_", lambda *tensors, **numbers: None, lib=_library)


def _second_moment(rule: Rule) -> str:
    """The numbers that only a rule with a second moment takes."""
    if not rule.has_second_moment:
        return ""
    return "float beta2, float eps" + (", bool bias_correction" if rule.corrects_bias else "")


_define()
availability.load()
