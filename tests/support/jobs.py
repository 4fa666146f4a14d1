"""Small DeepSpeed jobs, run on every rank of a ``Processes`` world; each returns plain values for the test to judge."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

INPUTS, HIDDEN, OUTPUTS, MICRO_BATCH = 6, 8, 3, 2


def net(seed: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))


def batch(rank: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """float32 data that differs by rank, step and micro-batch. Ranks 2 and 3 never see the first input, whose weights
    have no gradient there: a replica that others bring a momentum of what it knows nothing of."""
    generator = torch.Generator().manual_seed(10_000 * rank + 100 * step + micro)
    inputs, targets = (
        torch.randn(MICRO_BATCH, INPUTS, generator=generator),
        torch.randn(MICRO_BATCH, OUTPUTS, generator=generator),
    )
    inputs[:, 0] *= rank % 4 < 2
    return inputs, targets


def loss_of(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = data
    return (model(inputs.to(next(model.parameters()).dtype)).float() - targets).square().mean()


def two_groups(model: nn.Module) -> list[dict]:
    """Matrices, and biases with settings of their own."""
    return [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 5e-3, "sync_every": {"params": 2}},
    ]


@contextlib.contextmanager
def engine_for(ds: dict, model: nn.Module | None = None, groups: Any = None, **options: Any) -> Iterator[Any]:
    """A quiet DeepSpeed engine of our net, destroyed at the end."""
    import deepspeed

    import deslo_plugin  # noqa: F401  (its hooks)

    # an op for inference only, which would be compiled at first, and whose lock outlives a killed process
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("deslo_plugin").setLevel(logging.ERROR)
    model = model or net()
    base = {"train_micro_batch_size_per_gpu": MICRO_BATCH, "steps_per_print": 10**9, "gradient_clipping": 0.0}
    if groups is None and "optimizer" in ds:
        groups = two_groups(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=base | ds, **options)
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, steps: range, broken: tuple[int, int] | None = None) -> list[float]:
    """Steps ``engine``; ``broken`` = (replica, step) puts a NaN into that replica's loss. Returns the losses. Every
    forward must use the masters: an oracle that looks at masters alone would not see a model that computes with
    others."""
    rank, losses = dist.get_rank(), []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            with forward_uses_the_masters(engine, f"step {step}"):
                loss = loss_of(engine, batch(rank, step, micro))
            if broken == (rank // engine.deslo.topology.replica_size, step):
                loss = loss * float("nan")
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


@contextlib.contextmanager
def forward_uses_the_masters(engine: Any, when: str) -> Iterator[None]:
    """Asserts that a forward of our ``engine`` inside uses, to the bit, its replica's masters in the model's dtype."""
    from deslo_plugin.frameworks.deepspeed.export import full_params

    used: dict[str, Tensor] = {}
    hooks = [  # after DeepSpeed's own, which gather
        module.register_forward_pre_hook(
            lambda module, *_, at=at: used.update(
                {f"{at}.{name}": p.detach().clone() for name, p in module.named_parameters(recurse=False)}
            )
        )
        for at, module in engine.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    masters = dict(full_params(engine)) if hasattr(engine, "deslo") else {}
    for name, weight in used.items():
        master = masters.get(name, weight).to(weight.dtype).view(weight.shape)
        # a NaN that nothing stopped is the same NaN
        apart = ((weight - master).abs() > 0) | (weight.isnan() != master.isnan())
        assert not apart.any(), (
            f"{when}: the forward used a {name} that is {(weight - master).abs().max():.3g} off its master"
        )


def replica_state(engine: Any, moments: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """state -> parameter name -> full tensor of this rank's replica, in float32."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, out = engine.deslo.optimizer, {"params": {}}
    rules = [] if moments is not None else list(optimizer.config.optimizer.by_rule.values())
    masters = dict(engine.module.named_parameters())
    if not engine.zero_optimization() and engine.bfloat16_enabled():
        flat = [high for group in engine.optimizer.fp32_groups for high in group]
        low = [p for group in engine.optimizer.fp16_groups for p in group]
        masters = {name: flat[[id(q) for q in low].index(id(p))] for name, p in masters.items()}
    for name, param in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(param) if engine.zero_optimization() else masters[name]
        out["params"][name] = whole.detach().float().clone().cpu().view(-1)
        for moment in moments if moments is not None else rules[-(param.ndim != 2)].moments:
            whole = (
                safe_get_full_optimizer_state(param, moment)
                if engine.zero_optimization()
                else optimizer.state[masters[name]][moment]
            )
            out.setdefault(moment, {})[name] = whole.detach().clone().cpu().view(-1)
    return out


def run(ds: dict, steps: int, broken: tuple[int, int] | None = None) -> dict:
    """Trains and returns this replica's states, the meter, and the plan's figures."""
    with engine_for(ds) as engine:
        losses = train(engine, range(steps), broken)
        meter, plan = engine.deslo.stats, engine.deslo.plan
        return {
            "states": replica_state(engine),
            "losses": losses,
            "bytes": dict(meter.bytes),
            "events": dict(meter.events),
            "skipped": meter.skipped_steps,
            "planned": {state: sum(plan.bytes_at(t).get(state, 0) for t in range(steps)) for state in meter.bytes},
            "vectors_per_step": plan.vectors_per_step,
            "lr": engine.get_lr(),
        }


def stock_engine(ds: dict, seed: int = 7) -> contextlib.AbstractContextManager:
    """An engine with the JSON's own optimizer, in two param groups without periods."""
    model = net(seed)
    groups = [{key: value for key, value in group.items() if key != "sync_every"} for group in two_groups(model)]
    return engine_for(ds, model, groups)


def stock_params(engine: Any) -> dict:
    """Only the parameters: DeepSpeed itself loses sight of stock states in param groups after the first."""
    return {"states": {"params": replica_state(engine, ())["params"]}}


def run_stock(ds: dict, steps: int, broken: tuple[int, int] | None = None) -> dict:
    """``run`` of the JSON's own optimizer."""
    with stock_engine(ds) as engine:
        train(engine, range(steps), broken)
        meter, plan = engine.deslo.stats, engine.deslo.plan
        planned = {state: sum(plan.bytes_at(t).get(state, 0) for t in range(steps)) for state in meter.bytes}
        return stock_params(engine) | {"bytes": dict(meter.bytes), "planned": planned, "skipped": meter.skipped_steps}


def resumed_stock(ds: dict, folder: str, before: int, after: int) -> tuple[dict, dict]:
    """``resumed`` of the JSON's own optimizer."""
    with stock_engine(ds) as engine:
        train(engine, range(before))
        engine.save_checkpoint(folder)
        train(engine, range(before, before + after))
        straight = stock_params(engine)
    with stock_engine(ds, seed=8) as engine:
        engine.load_checkpoint(folder)
        train(engine, range(before, before + after))
        return straight, stock_params(engine)


def low_precision_copies(ds: dict, steps: int) -> list[dict[str, Tensor]]:
    """After every step, (fp32 masters rounded, bf16 parameters) by name."""
    from deepspeed.runtime.zero import GatheredParameters

    seen = []
    with engine_for(ds) as engine:
        for step in range(steps):
            train(engine, range(step, step + 1))
            masters = replica_state(engine)["params"]
            with GatheredParameters(list(engine.module.parameters()), enabled=engine.zero_optimization_stage() == 3):
                copies = {name: p.detach().clone().view(-1) for name, p in engine.module.named_parameters()}
            seen.append({name: (masters[name].bfloat16(), copies[name]) for name in copies})
    return seen


def traffic(ds: dict, steps: int) -> list[tuple[int, str, list[int], int]]:
    """Every collective of ``torch.distributed``: (step, name, ranks, bytes of its largest tensor)."""
    calls: list[tuple[int, str, list[int], int]] = []
    clock = [-1]
    names = [
        "all_reduce",
        "broadcast",
        "reduce",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "all_to_all_single",
        "all_gather_object",
    ]
    originals = {name: getattr(dist, name) for name in names}

    def recorded(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or dist.group.WORLD
            sizes = [value.nbytes for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
            calls.append((clock[0], name, dist.get_process_group_ranks(group), max(sizes, default=0)))
            return originals[name](*args, **kwargs)

        return call

    with engine_for(ds) as engine:
        for name in names:
            setattr(dist, name, recorded(name))
        try:
            for step in range(steps):
                clock[0] = step
                train(engine, range(step, step + 1))
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)
    return calls


FP16 = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1}


@contextlib.contextmanager
def fp16_everywhere() -> Iterator[None]:
    """fp16 on processors too whose DeepSpeed accelerator declines it (the arithmetic is torch's anyway)."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    supported, kind.is_fp16_supported = kind.is_fp16_supported, lambda self: True
    try:
        yield
    finally:
        kind.is_fp16_supported = supported


def run_fp16(ds: dict, steps: int, broken: tuple[int, int]) -> dict:
    """``run`` in fp16."""
    with fp16_everywhere():
        return run({**ds, "fp16": FP16}, steps, broken)


def weighted(ds: dict, steps: int) -> dict:
    """Bytes counted and planned, and what leaving a step out says, of an engine whose ranks tell what they saw."""
    with engine_for(ds) as engine:
        for step in range(steps):
            engine.deslo.record_samples(1 + dist.get_rank())
            train(engine, range(step, step + 1))
        meter, plan = engine.deslo.stats, engine.deslo.plan
        planned = {state: sum(plan.bytes_at(t).get(state, 0) for t in range(steps)) for state in meter.bytes}
        try:
            engine.deslo.skip_step()
        except ValueError as error:
            return {"bytes": dict(meter.bytes), "planned": planned, "skip": str(error), "states": replica_state(engine)}
