"""The synchronous warm-up where no wrapper reduces gradients across replicas: at the end of every backward."""

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from deslo_plugin.averaging.state_averager import StateAverager

SPARSE = 2.0**20  # more than replicas


class GradientAveraging:
    """While ``averaging.synchronous``, gradients are the replicas' mean as soon as ``backward`` returns.

    With gradient accumulation every backward that leaves gradients averages what has accumulated, which is the same
    mean. A parameter that some replica did not use counts as zero there, one that none used keeps no gradient, as in
    DDP."""

    def __init__(self, model: nn.Module, averaging: StateAverager):
        self._averaging, self._queued = averaging, False
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._hooks = [param.register_post_accumulate_grad_hook(self._arrived) for param in self._params]

    def _arrived(self, _: Tensor) -> None:
        if not self._averaging.synchronous:
            for hook in self._hooks:
                hook.remove()
        elif not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._last)

    def _last(self) -> None:
        """After what wrappers have queued by now: FSDP2's callback waits for gradients that another stream writes."""
        Variable._execution_engine.queue_callback(self._finished)

    @torch.no_grad()
    def _finished(self) -> None:
        self._queued = False
        used = torch.tensor([_use(param) for param in self._params], dtype=torch.float32, device=self._params[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self._params]
        self._averaging.gradients.average(self._averaging.steps + 1, [*gradients, used])
        for param, gradient, share in zip(self._params, gradients, used.tolist()):
            if share > 1:  # an optimizer for sparse gradients takes no other
                gradient = gradient.to_sparse(1)
            param.grad = gradient if share else None


def _use(param: Tensor) -> float:
    """How this replica has used ``param``: 0 not, 1 with a dense gradient, or so much that the mean over replicas is
    above 1."""
    return 0.0 if param.grad is None else SPARSE if param.grad.is_sparse else 1.0
