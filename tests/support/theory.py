"""What the job in jobs.py must come to, by the float64 oracle: 4 ranks, two param groups, accumulation, clipping."""

from dataclasses import replace

import torch

from deslo_plugin.algorithm.fragments import offsets
from tests.support import jobs
from tests.support.oracle import Setting, states, train

ACCUMULATION, CLIP = 2, 0.3
PERIODS = {"x": 3, "u1": 6, "u2": 4, "v": 12}
RULES = {
    "des-loc-adam": Setting("adam", PERIODS, [0.9], [1.0], eps=1e-3),
    "mt-dao-adam-n2": Setting("adam", PERIODS, [0.9, 0.99], [0.5, 0.3], eps=1e-3),
    "mt-dao-adopt-qh": Setting("adopt", PERIODS, [0.99], [0.7], eps=1e-3, lr=1e-3),
    "des-loc-sgdm": Setting("sgdm", PERIODS, [0.9], [1.0]),
}


def oracle_states(
    s: Setting,
    steps: int,
    broken: tuple[int, int] | None = None,
    *,
    replicas: int = 2,
    synchronous_steps: int = 0,
    own_period: bool = True,
    ranks: int = 4,
    places: dict[str, torch.Tensor] | None = None,
) -> list[dict]:
    """replica -> state -> parameter name -> flat tensor. ``own_period``: the biases meet every 2 steps, as in jobs.py.
    ``places``: of each parameter, the fragment of each element."""
    shards = ranks // replicas
    model = jobs.net().cpu().double()
    groups = jobs.two_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    settings = [
        Setting(**vars(s) | {"weight_decay": 0.1}),
        Setting(**vars(s) | {"lr": 5e-3, "periods": s.periods | ({"x": 2} if own_period else {})}),
    ]

    if places:
        count = int(max(each.max() for each in places.values())) + 1
        for index, group in enumerate(groups):
            own = torch.cat([places[names[id(p)]] for p in group["params"]])
            settings[index] = replace(cut(settings[index], count), places=own)

    def gradient(replica, step, vectors):
        if broken == (replica, step):
            return None
        for group, vector in zip(groups, vectors):
            torch.nn.utils.vector_to_parameters(vector, group["params"])
        model.zero_grad()
        for rank in range(replica * shards, (replica + 1) * shards):
            for micro in range(ACCUMULATION):
                inputs, targets = (each.cpu().double() for each in jobs.batch(rank, step, micro))
                ((model(inputs) - targets).square().mean() / (shards * ACCUMULATION)).backward()
        return [torch.cat([p.grad.flatten() for p in group["params"]]) for group in groups]

    starts = [torch.cat([p.detach().flatten() for p in group["params"]]) for group in groups]
    world = train(
        settings,
        [x.clone() for x in starts],
        replicas,
        steps,
        gradient,
        norm_clip=CLIP,
        synchronous_steps=synchronous_steps,
    )
    out = []
    for replica in world:
        by_state: dict = {}
        for s_g, group, params in zip(settings, replica, groups):
            for state, vector in states(s_g, group).items():
                for param, part in zip(params["params"], vector.split([p.numel() for p in params["params"]])):
                    by_state.setdefault(state, {})[names[id(param)]] = part
        out.append(by_state)
    return out


def cut(s: Setting, count: int) -> Setting:
    """``s`` with each state in ``count`` fragments, averaged when the package says."""
    keys = ["x", *(f"u{j + 1}" for j in range(len(s.betas))), *(["v"] if s.rule != "sgdm" else [])]
    found = offsets(tuple((key, s.periods[key]) for key in keys), count)
    return replace(s, offsets={key: list(starts) for key, starts in found.items()})


def assert_oracle(results: list[dict], theory: list[dict], tolerance: float = 1e-5) -> None:
    """Every rank's ``states`` are those of its replica."""
    for rank, result in enumerate(results):
        for state, tensors in theory[rank * len(theory) // len(results)].items():
            for name, expected in tensors.items():
                error = (result["states"][state][name].double() - expected).abs().max()
                assert error <= tolerance, f"rank {rank}, {state} of {name}: {error:.3g}"
