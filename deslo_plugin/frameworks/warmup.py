"""The synchronous warm-up where no wrapper reduces gradients across replicas: at the end of every backward."""

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from deslo_plugin.averaging import Averaging


class GradientAveraging:
    """While ``averaging.synchronous``, gradients are the replicas' mean as soon as ``backward`` returns.

    With gradient accumulation every backward that leaves gradients averages what has accumulated, which is the same mean.
    A parameter that some replica did not use counts as zero there, one that none used keeps no gradient, as in DDP.
    """

    def __init__(self, model: nn.Module, averaging: Averaging):
        self._averaging, self._queued = averaging, False
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._hooks = [param.register_post_accumulate_grad_hook(self._arrived) for param in self._params]

    def _arrived(self, _: Tensor) -> None:
        if not self._averaging.synchronous:
            for hook in self._hooks:
                hook.remove()
        elif not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._finished)

    @torch.no_grad()
    def _finished(self) -> None:
        self._queued = False
        used = torch.tensor([float(param.grad is not None) for param in self._params], device=self._params[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        self._averaging.average_gradients(self._averaging.steps + 1, [*gradients, used])
        for param, gradient, share in zip(self._params, gradients, used.tolist()):
            param.grad = gradient if share else None
