"""Updates of whole matrices, whose tensors may lie in parts on the ranks of a replica.

They are made of torch's operators everywhere: nearly all of their time goes into products of matrices."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from deslo_plugin.algorithm.orthogonal import Orthogonal
from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.kernels.update import OPERATORS, reference

Whole = Callable[[Tensors, Tensors, Callable[[Tensor], Tensor]], Tensors]
"""Takes the parameters that this rank steps, its parts of directions, and what to make of each whole one; gives its
parts of what that makes. Collective over the ranks that hold the parts."""

_muon = reference("muon")


def muon_(x: Tensors, g: Tensors, u: Sequence[Tensors], *, copy: Tensors = (), **numbers: Any) -> None:
    """``rules.muon_`` with the options of the operators (``kernels.update``)."""
    for scalar in ("t", "lr"):
        if isinstance(numbers[scalar], Tensor):
            numbers |= {scalar: numbers[scalar].item()}
    x, g, flat, copy = map(local, (x, g, list(chain.from_iterable(u)), copy))
    _muon(x, g, flat, copy, **numbers)


UPDATES: Mapping[str, Callable[..., None]] = {**OPERATORS, "muon": muon_}
"""Rule -> its update."""


def bound(constants: Mapping[str, Any], params: Tensors, whole: Whole | None = None) -> Mapping[str, Any]:
    """``constants`` of a rule for an update of ``params``: what makes directions orthogonal learns where the parts of
    a matrix are; ``whole`` knows, or the ``params`` themselves show it."""
    if "orthogonal" not in constants:
        return constants
    others = dict(constants)
    orthogonal: Orthogonal = others.pop("orthogonal")
    gather = whole or as_they_lie
    return others | {"orthogonalise": lambda parts: gather(params, parts, orthogonal)}


def as_they_lie(params: Tensors, parts: Tensors, make: Callable[[Tensor], Tensor]) -> Tensors:
    """A ``Whole`` for ``params`` that show where their parts are: DTensors, and whole matrices."""
    return [_made_whole(param, part, make) for param, part in zip(params, parts)]


def _made_whole(param: Tensor, part: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``make`` gives for the matrix of which ``part`` lies here as ``param`` does: this rank's part of it."""
    if not hasattr(param, "to_local"):
        return make(part)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    parts = DTensor.from_local(part, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())
    made = make(parts.full_tensor()).contiguous()
    everywhere = DTensor.from_local(made, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements).to_local()
