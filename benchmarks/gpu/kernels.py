"""Do the CUDA kernels give the bits of the CPU kernels: every rule, dtype, tail and alignment.

    python -m benchmarks.gpu.kernels [--device cuda] [--quick] [--big]

--quick takes a few cases, as for compute-sanitizer; --big adds tensors of more than 2^31 elements. On --device cpu the
script checks itself. Prints a line for each group of checks and exits 1 if any failed.
"""

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from deslo_plugin.kernels import update as ops
from tests.support.cases import Case, like

F32, F64, BF, HF = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [(0,), (1,), (3,), (4,), (255,), (1023,), (1024,), (1025,), (7, 333), (40_001,)]
SINGLE = (F32, F32, F32, None)  # x, g, states, copy
TYPES = [
    SINGLE,
    (BF, BF, F32, None),
    (F32, BF, F32, BF),
    (HF, HF, F32, None),
    (F32, F32, BF, None),
    (BF, BF, BF, None),
    (F64, F64, F64, None),
]
LENGTHS = (1, 5, 4096, 100_003, 0)
Verdict = str | None  # what is wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--big", action="store_true")
    given = parser.parse_args()
    device, failed = given.device, []
    checks: dict[str, Callable[[], Verdict]] = {
        "rules x momenta x dtypes x tails x unaligned": lambda: rules(device, given.quick),
        "clip_value, grad_scale, found_inf": lambda: options(device),
        "2,000 tensors, which need several launches": lambda: many(device),
        "a permuted dense layout": lambda: permuted(device),
        "NaN, inf and subnormal gradients": lambda: broken(device),
        "step and rate in tensors, to one rounding": lambda: in_tensors(device),
        "arguments on two devices, or that overlap, are refused": lambda: refused(device),
        "drift: float64, deterministic, sees NaN": lambda: drifts(device),
        "land_": lambda: landings(device),
        "fingerprint: dtypes, tails, unaligned, many": lambda: fingerprints(device),
    }
    if device == "cuda":
        checks |= {"the current stream": side_stream, "a CUDA graph with other steps and rates": graph}
        if given.big:
            checks |= {"more than 2^31 elements": big}
    for name, check in checks.items():
        try:
            wrong = check()
        except Exception:
            wrong = traceback.format_exc(limit=3)
        print(f"{'FAILED' if wrong else 'ok    '} {name}" + (f": {wrong}" if wrong else ""), flush=True)
        failed += [name] * bool(wrong)
    where = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{len(checks) - len(failed)} of {len(checks)} groups passed on {where}, kernels {ops.native()}")
    sys.exit(bool(failed))


def differs(case: Case, device: str) -> bool:
    """Whether the kernels of ``device`` give other bits than those of the CPU; NaN is NaN."""
    ours, theirs = case.on(device).native(), case.on("cpu").native()
    return any(not same(mine, other) for mine, other in zip(ours, theirs, strict=True))


def same(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.cpu(), theirs.cpu()
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def rules(device: str, quick: bool) -> Verdict:
    counts, steps = ((1, 5), (7,)) if quick else ((1, 2, 3, 4, 5, 16), (0, 7))
    for rule, n, t, kinds, offset in itertools.product(ops.OPERATORS, counts, steps, TYPES, (0, 1)):
        case = Case(rule, n, SIZES, [kinds] * len(SIZES), t=t, offset=offset, seed=n, device="cpu")
        if differs(case, device):
            return f"{rule} N={n} t={t} {kinds} offset={offset}"


def options(device: str) -> Verdict:
    scale, found, none = (torch.tensor(value) for value in (0.125, 1.0, 0.0))
    chosen = ({"clip_value": 0.3}, {"grad_scale": scale}, {"found_inf": found}, {"found_inf": none})
    for rule, more in itertools.product(ops.OPERATORS, chosen):
        if differs(Case(rule, 2, SIZES, [SINGLE] * len(SIZES), device="cpu", **more), device):
            return f"{rule} {more}"


def many(device: str) -> Verdict:
    case = Case("adam", 2, [(i % 700,) for i in range(2000)], [SINGLE] * 2000, device="cpu")
    return "other bits" if differs(case, device) else None


def permuted(device: str) -> Verdict:
    case = Case("adam", 1, [(8, 6, 5)] * 3, [SINGLE] * 3, device="cpu")
    for tensors in (case.x, case.g, case.u, case.v[0]):
        tensors[:] = [tensor.permute(2, 0, 1) for tensor in tensors]
    return "other bits" if differs(case, device) else None


def broken(device: str) -> Verdict:
    case = Case("adam", 1, [(4099,)], [SINGLE], device="cpu")
    case.g[0][5], case.g[0][4098], case.g[0][77] = float("nan"), float("inf"), 1e-42
    return "other bits" if differs(case, device) else None


def in_tensors(device: str) -> Verdict:
    for rule, t in itertools.product(ops.OPERATORS, (0, 1, 999)):
        case = Case(rule, 2, SIZES, [SINGLE] * len(SIZES), t=t, device="cpu")
        by_value = case.native()
        told = {
            "t_tensor": torch.tensor(t),
            "lr_tensor": torch.tensor(case.numbers["lr"], dtype=F64),
            "t": 0,
            "lr": 7.0,
        }
        case.numbers |= told
        for ours, theirs in zip(case.on(device).native(), by_value):
            if not torch.allclose(ours.cpu().double(), theirs.double(), rtol=3e-7, atol=1e-7):
                return f"{rule} t={t}: {(ours.cpu() - theirs).abs().max()}"


def refused(device: str) -> Verdict:
    x = torch.zeros(8, device=device)
    bad = {"overlap": [x, x]} | ({"device": [x, torch.zeros(8)]} if device != "cpu" else {})
    for word, params in bad.items():
        g, u = [x.clone(), x.clone()], [x.clone(), x.clone()]
        numbers = {"t": 1, "lr": 0.1, "weight_decay": 0.0, "betas": [0.9], "weights": [1.0]}
        try:
            torch.ops.deslo.sgdm_(params, g, u, [], **numbers)
            return f"{word}: accepted"
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if word not in str(error):
                return f"{word}: {str(error)[:120]}"


def unaligned(kind: torch.dtype, offset: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n + offset, generator=generator).to(kind)[offset:] for n in LENGTHS]


def drifts(device: str) -> Verdict:
    there = lambda tensors: [like(tensor, device) for tensor in tensors]
    for kinds, offset in itertools.product(((F32, F32), (BF, F32), (HF, F32), (F64, F64), (F32, F64)), (0, 1)):
        local, mean = (unaligned(kind, offset, seed) for seed, kind in enumerate(kinds))
        got, again = (torch.ops.deslo.drift(there(local), there(mean)).cpu() for _ in range(2))
        l, m = (torch.cat([tensor.double() for tensor in tensors]) for tensors in (local, mean))
        expected = torch.stack([(l - m).square().sum(), l @ m, m.square().sum()])
        if not torch.allclose(got, expected, rtol=1e-9, atol=1e-9):
            return f"{kinds} offset {offset}: expected {expected.tolist()}, got {got.tolist()}"
        if not torch.equal(got, again):
            return f"{kinds} offset {offset}: two calls gave {got.tolist()} and {again.tolist()}"
    bad = torch.zeros(5000)
    bad[4999] = float("nan")
    sums = torch.ops.deslo.drift(there([torch.zeros(5000)]), there([bad]))
    return None if sums[0].isnan() and sums[2].isnan() else "NaN is not seen"


def landings(device: str) -> Verdict:
    there = lambda tensors, where: [like(tensor, where) for tensor in tensors]
    types = ((F32, F32), (BF, F32), (HF, F32), (F64, F64), (F32, F64), (BF, F64))
    for (kind, wide), offset in itertools.product(types, (0, 1)):
        x, local, mean = (unaligned(each, offset, seed) for seed, each in enumerate((kind, wide, wide)))
        results = []
        for where in (device, "cpu"):
            results.append(there(x, where))
            torch.ops.deslo.land_(results[-1], there(local, where), there(mean, where), 0.9)
        if not all(map(same, *results)):
            return f"{kind} {wide} offset {offset}"


def fingerprints(device: str) -> Verdict:
    number = lambda tensors, where: torch.ops.deslo.fingerprint([like(tensor, where) for tensor in tensors]).item()
    cases = {
        (kind, offset): unaligned(kind, offset, 0) for kind in (F32, F64, BF, HF, torch.int8) for offset in (0, 1, 2)
    }
    cases["3,000 tensors"] = [torch.randn(i % 700) for i in range(3000)]
    for name, tensors in cases.items():
        ours, theirs = number(tensors, device), number(tensors, "cpu")
        if ours != theirs:
            return f"{name}: expected {theirs} of the CPU, got {ours}"


def side_stream() -> Verdict:
    case = Case("adam", 1, [(1 << 20,)], [SINGLE], device="cpu")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # the arguments are made late, on this stream
        got = case.on("cuda").native()
        got = [tensor.cpu() for tensor in got]
    return None if all(map(same, got, case.native())) else "ran on another stream than its arguments"


def graph() -> Verdict:
    x, g, u, v = (torch.rand(5000, device="cuda") for _ in range(4))
    y, w, z = x.clone(), u.clone(), v.clone()
    t, lr = torch.zeros((), dtype=torch.int64, device="cuda"), torch.tensor(1e-2, dtype=F64, device="cuda")
    numbers = {"weight_decay": 0.1, "betas": [0.9], "weights": [1.0], "beta2": 0.95, "eps": 1e-8}
    step = lambda x, u, v: ops.adam_([x], [g], [[u]], [v], t=t, lr=lr, bias_correction=True, **numbers)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x.clone(), u.clone(), v.clone())
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step(x, u, v)
    for i in range(3):
        t.fill_(i)
        lr.fill_(1e-2 / (i + 1))
        captured.replay()
        step(y, w, z)
        if not (torch.equal(x, y) and torch.equal(u, w) and torch.equal(v, z)):
            return f"replay {i} gives other bits than the step itself"


def big() -> Verdict:
    n = 2**31 + 1027
    x, g, u = (torch.full((n,), value, dtype=BF, device="cuda") for value in (1.0, 0.5, 0.25))
    x[-1], g[-1] = 3.0, 2.0
    torch.ops.deslo.sgdm_([x], [g], [u], [], t=1, lr=1.0, weight_decay=0.0, betas=[0.0], weights=[1.0])
    found = [x[at].item() for at in (0, n // 2, -2, -1)]
    if found != [0.5, 0.5, 0.5, 1.0]:
        return f"sgdm: expected 0.5, 0.5, 0.5, 1, got {found}"
    del g, u
    square = torch.ops.deslo.drift([x], [torch.ones(n, device="cuda")])[2].item()
    if abs(square - n) > 1e-3 * n**0.5:
        return f"drift: expected {n}, got {square}"
    before = torch.ops.deslo.fingerprint([x])
    x[-1] = -x[-1]
    return "fingerprint: the last element changed unseen" if before == torch.ops.deslo.fingerprint([x]) else None


if __name__ == "__main__":
    main()
