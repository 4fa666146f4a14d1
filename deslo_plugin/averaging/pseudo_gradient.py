"""How well replicas agree on where to go: the worker-to-global cosine of the pseudo-gradient (arXiv 2510.05361).

Between two averages replica m moves its parameters by Delta_m = x_m - a, with a the parameters after the last average.
The cosine of Delta_m and the mean of all of them is that of the papers' figures. It needs a, a copy of this rank's
parameters, and a pass of its own at each average; hence only where it is asked for
(``deslo.telemetry.pseudo_gradient``)."""

from collections.abc import Callable

import torch
from torch import Tensor

from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.averaging.cohort import Cohort, Key
from deslo_plugin.averaging.flight import States
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.kernels.drift import drift_of, measure
from deslo_plugin.kernels.local_tensors import local

NAME = "pseudo_gradient"
Receive = Callable[[Cohort, States, States], None]


class PseudoGradient:
    """Wraps what writes landed means, and emits a ``SyncEvent`` with the drift of ``pseudo_gradient`` after each of
    them.

    The first average of a parameter, and the first after a load, only sets what the next is measured from.
    """

    def __init__(self, receive: Receive, on_average: Callable[[SyncEvent], object]):
        self._receive, self._on_average = receive, on_average
        self._anchors: dict[Key, tuple[int, Tensor]] = {}  # part -> (when it was averaged, what it was then)

    def __call__(self, cohort: Cohort, states: States, means: States) -> None:
        if PARAMS not in means:
            return self._receive(cohort, states, means)
        last = cohort.steps - cohort.group["sync_every"][PARAMS]
        anchors = [self._anchors.get(key) for key in cohort.keys]
        sums = [
            # one by one: two copies of one, not of all
            measure([(x - known[1]).flatten()], [(mean - known[1]).flatten()])
            for x, mean, known in zip(states[PARAMS], means[PARAMS], anchors)
            if known is not None and known[0] == last
        ]
        if len(sums) == len(anchors):
            drift = drift_of(torch.stack(sums).sum(0).tolist())
            self._on_average(SyncEvent(cohort.steps, {}, 0.0, {NAME: drift}))
        self._receive(cohort, states, means)
        for key, x in zip(cohort.keys, cohort.parts(local(cohort.params))):
            self._anchors[key] = cohort.steps, x.detach().clone()
