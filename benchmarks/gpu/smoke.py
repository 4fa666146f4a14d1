"""Does anything run at all: one call of each operator, one step of the optimizer.

    python -m benchmarks.gpu.smoke [--device cuda]

A null pointer in the native module ends the process, and says where.
"""

import argparse
import faulthandler

import torch

import deslo_plugin
from deslo_plugin.kernels import update as ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    faulthandler.enable()
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"deslo_plugin {deslo_plugin.__version__}, torch {torch.__version__}, {where}, kernels {ops.native()}")
    if device == "cuda" and "cuda" not in ops.native():
        raise SystemExit("kernels: expected cpu+cuda; build them with DESLO_NATIVE=cuda, or give --pack to plan.py")
    x, g, u, v = (torch.rand(1000, device=device) for _ in range(4))
    numbers = {"t": 1, "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9], "weights": [1.0]}
    ops.sgdm_([x], [g], [[u]], **numbers)
    for update in (ops.adam_, ops.adopt_):
        more = {"bias_correction": True} if update is ops.adam_ else {}
        update([x], [g], [[u]], [v], beta2=0.95, eps=1e-8, **numbers, **more)
    print("drift", torch.ops.deslo.drift([x], [g]).tolist())
    torch.ops.deslo.land_([x], [g], [u], 0.5)
    print("fingerprint", torch.ops.deslo.fingerprint([x, g]).item())
    p = torch.nn.Parameter(torch.ones(1000, device=device))
    optimizer = deslo_plugin.DesLoc([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    assert p.isfinite().all() and (p < 1).all() and x.isfinite().all()
    print("smoke ok")


if __name__ == "__main__":
    main()
