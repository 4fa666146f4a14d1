"""Gradients before a step uses them: whether they are finite, and their mean while the warm-up lasts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deslo_plugin.algorithm.outer_optimizer import write_means
from deslo_plugin.algorithm.rules import Tensors
from deslo_plugin.algorithm.state_names import GRADIENTS
from deslo_plugin.averaging.metrics import Meter
from deslo_plugin.averaging.synchronizer import Synchronizer, finite
from deslo_plugin.kernels.local_tensors import gradients_of, local


class Gradients:
    """Of the ``groups`` that ``optimizer`` steps; averages go by ``sync`` and are counted in ``stats``.

    ``skips_nonfinite``: the replica looks at them, and leaves an update out that is not finite.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Callable[[], Sequence[Mapping[str, Any]]],
        sync: Synchronizer,
        stats: Meter,
        skips_nonfinite: bool,
    ):
        self._optimizer, self._groups, self._sync, self._stats = optimizer, groups, sync, stats
        self.skips_nonfinite = skips_nonfinite

    def local(self) -> Tensors:
        """This rank's part of every gradient that there is; of sparse ones the values."""
        return gradients_of(param for group in self._groups() for param in group["params"])

    def vote_to_skip(self) -> bool:
        """Decides, and counts, whether this replica leaves out the update because its gradients are not finite.

        A ``GradScaler`` says so in ``optimizer.found_inf``; with ``on_nonfinite: "skip"`` the gradients are looked at.
        Collective over the replica's ranks where either applies.
        """
        found_inf = getattr(self._optimizer, "found_inf", None)
        if found_inf is None and not self.skips_nonfinite:
            return False
        mine = bool(found_inf) if found_inf is not None else not finite(self.local())
        skip = self._sync.transport.any(mine)
        self._stats.skipped_steps += skip
        return skip

    def average(self, steps: int, gradients: Tensors) -> None:
        """gradients <- E_m[gradients], at once: what step number ``steps`` of the warm-up does before clipping.
        Collective."""
        if gradients:
            states = {GRADIENTS: local(gradients)}
            write_means(states, self._sync.mean(steps, states))
