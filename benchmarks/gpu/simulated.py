"""Have simulated replicas on a GPU the gradients of their model? Vectorised ones against one after the other.

    python -m benchmarks.gpu.simulated [--device cuda] [--quick]

The recipe's model, four replicas, in bfloat16. For each kind of attention that torch has under ``vmap``, and for the
ones that ``Network`` keeps to, it prints the distance of the gradients as a share of their length. Exits 1 if those of
``Network`` are further off than bfloat16 explains.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.recipe import SETTING, TINY
from benchmarks.simulation.small_gpt import drawn, initial
from deslo_plugin.simulation import Network

NEAR = 1e-2
KINDS = {
    "torch's choice": list(SDPBackend.__members__.values())[1:],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    given = parser.parse_args()
    setting = replace(TINY if given.quick else SETTING, device=given.device)
    count = setting.replicas
    batches = drawn(setting.shape, sequences=setting.sequences, replicas=count, seed=0, device=given.device)
    model = initial(setting.shape, 0).to(given.device)
    vectorised, apart = (Network(model, batches, [], vectorised=each) for each in (True, False))

    def gradients(losses: Callable[[Tensor], Tensor]) -> Tensor:
        x = apart.start.expand(count, -1).clone().requires_grad_()
        with torch.autocast(given.device, torch.bfloat16):
            total = losses(x).sum()
        return torch.autograd.grad(total, x)[0]

    right = gradients(lambda x: apart.losses(x, range(count), 0))
    off = lambda found: ((found - right).norm() / right.norm()).item()
    for name, kinds in KINDS.items() if given.device == "cuda" else ():
        try:
            with sdpa_kernel(kinds):
                found = gradients(lambda x: vmap(vectorised._loss)(x, *batches(range(count), 0)))
            print(f"vmap, {name:15s} {off(found):.2g}", flush=True)
        except RuntimeError as error:
            print(f"vmap, {name:15s} {str(error).splitlines()[0]}", flush=True)
    ours = off(gradients(lambda x: vectorised.losses(x, range(count), 0)))
    print(f"Network{'':14s} {ours:.2g}")
    if not ours < NEAR:
        raise SystemExit(f"expected gradients within {NEAR} of those of each replica by itself, got {ours}")


if __name__ == "__main__":
    main()
