"""Averages in which a replica counts by what it has seen, against the float64 oracle, and what is told wrongly."""

import pytest
import torch

from deslo_plugin import AverageError, ConfigError, DesLoc
from tests.support import jobs as deepspeed_jobs
from tests.support import torch_jobs as jobs
from tests.support import torch_use_jobs
from tests.support.engine_configs import ds_config
from tests.support.oracle import Setting, blocks, states, train
from tests.support.quadratic import SIZE, assert_equal, noisy_quadratic
from tests.support.theory import RULES
from tests.support.worlds import threads

STEPS = 26
S = Setting("adam", {"x": 3, "u1": 6, "v": 12}, [0.9], [1.0], eps=1e-3)


def samples(replica: int, step: int) -> float:
    """Uneven in time as well; replica 2 sees nothing in the three steps before the average after step 9."""
    return 0.0 if replica == 2 and 6 <= step < 9 else [8.0, 3.0, 1.0][replica] * (1 + step % 4)


def gradient(replica: int, step: int, x: torch.Tensor) -> torch.Tensor | None:
    return noisy_quadratic(replica, step, x) if samples(replica, step) else None


def run_ours(s: Setting, told=samples, steps: int = STEPS, reload_at: int | None = None, **deslo) -> list[dict]:
    config = blocks(s, wire_dtype="float64", replica_weights="samples", bucket_cap_mb=1, **deslo)

    def replica(average):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, SIZE, dtype=torch.float64))]
        optimizer = DesLoc(params, config, transport=average)
        for step in range(steps):
            if step == reload_at:
                optimizer.load_state_dict(optimizer.state_dict())
            params[0].grad = gradient(average.rank, step, params[0].detach().clone())
            if told is not None and params[0].grad is not None:
                for _ in range(2):  # two micro-batches
                    optimizer.averaging.samples.record_samples(told(average.rank, step) / 2)
            optimizer.skip_step() if params[0].grad is None else optimizer.step()
        return {"params": params[0].detach()} | {
            n: optimizer.state[params[0]][n] for n in optimizer.config.optimizer.moments
        }

    return threads(3, replica)


def expected(s: Setting, told=samples) -> list[dict]:
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)

    def vectors(m, t, x):
        g = gradient(m, t, x[0])
        return None if g is None else [g]

    return [states(s, groups[0]) for groups in train([s], [start], 3, STEPS, vectors, samples=told)]


@pytest.mark.parametrize(
    "change, deslo",
    [
        ({}, {}),
        ({}, {"overlap_comm": False}),
        ({"after_update": True}, {}),
        ({"delay": 2}, {}),
        ({"rule": "sgdm", "periods": {"x": 3, "u1": 6}}, {}),
        ({"outer": (0.7, 0.9)}, {}),
    ],
    ids=str,
)
def test_every_order_is_the_oracle_in_float64(change, deslo):
    s = Setting(**vars(S) | change)
    assert_equal(run_ours(s, **deslo), expected(s), 1e-12)


def test_uneven_weights_make_a_difference_and_even_ones_weigh_by_steps_taken():
    weighted, alike = expected(S), expected(S, None)
    assert (weighted[0]["params"] - alike[0]["params"]).abs().max() > 1e-3
    seven = lambda replica, step: 7.0 if samples(replica, step) else 0.0
    assert_equal(run_ours(S, seven), expected(S, seven), 1e-12)


def test_a_replica_that_saw_nothing_takes_over_the_others():
    """After the update replicas are equal after each average, and replica 2 then counts nothing of what it was."""
    s = Setting(**vars(S) | {"after_update": True})
    ours = run_ours(s, lambda replica, step: float(replica != 2), steps=3)
    assert all(torch.equal(ours[2]["params"], other["params"]) for other in ours)
    two = [
        states(s, groups[0])["params"]
        for groups in train(
            [s], [torch.linspace(-1, 1, SIZE, dtype=torch.float64)], 2, 3, lambda m, t, x: [noisy_quadratic(m, t, x[0])]
        )
    ]
    assert torch.allclose(ours[2]["params"], two[0], atol=1e-12)


def test_nothing_told_is_an_error_at_the_first_average():
    with pytest.raises(
        ConfigError, match=r"weights .samples.: expected every rank to call record_samples.* from rank\(s\) \[0, 1, 2\]"
    ):
        run_ours(S, None)


def test_one_that_tells_nothing_is_named_by_all():
    with pytest.raises(ConfigError, match=r"nothing from rank\(s\) \[1\]"):
        threads(3, tells_unless(1))


def test_no_samples_on_any_replica_is_an_error():
    with pytest.raises(AverageError, match="expected samples .record_samples. on some replica since the last one"):
        run_ours(S, lambda replica, step: 0.0)


def tells_unless(silent: int):
    def replica(average):
        param = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = DesLoc([param], blocks(S, wire_dtype="float64", replica_weights="samples"), transport=average)
        for _ in range(5):
            param.grad = torch.ones_like(param)
            if average.rank != silent:
                optimizer.averaging.samples.record_samples(4)
            optimizer.step()

    return replica


@pytest.mark.parametrize("step", [3, 7])
def test_after_a_load_averages_go_on_from_what_is_told_since(step):
    """In the middle of a period, and between launch and landing, where nobody knows what was seen before."""
    results = run_ours(S, lambda replica, step: 5.0, reload_at=step)
    assert all(tensor.isfinite().all() for result in results for tensor in result.values())


@pytest.mark.parametrize("told", [-1, float("nan"), "8", True])
def test_what_is_no_count_is_refused(told):
    optimizer = DesLoc([torch.nn.Parameter(torch.ones(2))], {"deslo": {"replica_weights": "samples"}})
    with pytest.raises(ConfigError, match=r"record_samples\(samples\): expected a number >= 0"):
        optimizer.averaging.samples.record_samples(told)


def test_telling_where_nobody_asks_is_refused():
    with pytest.raises(ConfigError, match="expected deslo.replica_weights .samples., got .uniform."):
        DesLoc([torch.nn.Parameter(torch.ones(2))]).averaging.samples.record_samples(8)
    with pytest.raises(ConfigError, match="deslo.replica_weights: expected one of uniform, samples, got 'tokens'"):
        DesLoc([torch.nn.Parameter(torch.ones(2))], {"deslo": {"replica_weights": "tokens"}})


def adamw(model):
    return torch.optim.AdamW(jobs.stock_groups(model), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)


def theory_of(rank_of: list[list[int]], steps: int, rests: bool, own_period: bool = True) -> list[dict]:
    """replica -> name -> parameter, replicas of ``rank_of`` ranks on the batches of ``torch_jobs.batch_of``."""
    model = jobs.net().cpu().double()
    groups = deepspeed_jobs.two_groups(model)
    base = dict(vars(RULES["des-loc-adam"]))
    settings = [
        Setting(**base | {"weight_decay": 0.1}),
        Setting(**base | {"lr": 5e-3, "periods": base["periods"] | ({"x": 2} if own_period else {})}),
    ]

    def gradient(replica, step, vectors):
        for group, vector in zip(groups, vectors):
            torch.nn.utils.vector_to_parameters(vector, group["params"])
        model.zero_grad()
        for rank in rank_of[replica]:
            if not torch_use_jobs.batch_of(rank, step, rests):
                return None
            inputs, targets = (each.cpu().double() for each in jobs.batch(rank, step, 0))
            ((model(inputs) - targets).square().mean() / len(rank_of[replica])).backward()
        return [torch.cat([p.grad.flatten() for p in group["params"]]) for group in groups]

    starts = [torch.cat([p.detach().flatten() for p in group["params"]]) for group in groups]
    samples = lambda replica, step: sum(torch_use_jobs.batch_of(rank, step, rests) for rank in rank_of[replica])
    names = {id(p): name for name, p in model.named_parameters()}
    out = []
    for replica in train(settings, starts, len(rank_of), steps, gradient, samples=samples):
        out.append(
            {
                names[id(p)]: part
                for group, of in zip(replica, groups)
                for p, part in zip(of["params"], group.x.split([p.numel() for p in of["params"]]))
            }
        )
    return out


def assert_trained(results: list[dict], theory: list[dict]) -> None:
    for result, replica in zip(results, theory, strict=True):
        assert result["bytes"] == result["planned"]
        for name, expected in replica.items():
            assert (result["states"]["params"][name].double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("optimizer", [None, adamw], ids=["DesLoc", "AdamW"])
@pytest.mark.parametrize("wrap", ["plain", "ddp"])
def test_real_replicas_weigh_what_they_saw_and_leave_steps_out(four, wrap, optimizer):
    config = blocks(RULES["des-loc-adam"], replica_weights="samples", **({"replica_size": 1} if wrap == "ddp" else {}))
    if optimizer:
        config = {"deslo": config["deslo"] | {"sync_every": {"params": 3, "exp_avg": 6, "exp_avg_sq": 12}}}
    results = four().run(torch_use_jobs.weighted, wrap, config, 14, True, optimizer)
    assert_trained(results, theory_of([[0], [1], [2], [3]], 14, True, own_period=optimizer is None))
    assert all("replicas weighted by samples" in result["banner"] for result in results)


def test_a_replica_of_several_ranks_counts_what_all_of_them_saw(four):
    results = four().run(
        torch_use_jobs.weighted, "fsdp", blocks(RULES["des-loc-adam"], replica_weights="samples"), 14, False
    )
    theory = theory_of([[0, 1], [2, 3]], 14, False)
    assert_trained(results, [theory[0], theory[0], theory[1], theory[1]])


def test_running_statistics_have_the_weights_of_the_parameters(four):
    config = blocks(RULES["des-loc-adam"], replica_weights="samples", replica_size=1)
    results = four().run(torch_use_jobs.weighted, "ddp", config, 8, True, None, True)
    assert all(
        result["bytes"] == result["planned"] and result["bytes"]["buffers"] == 4 * 4 * (2 * 4 + 1) for result in results
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_replicas_send_what_was_planned(four, stage):
    ds = ds_config(RULES["des-loc-adam"], stage)
    ds["deslo"] |= {"replica_weights": "samples"}
    for result in four().run(deepspeed_jobs.weighted, ds, 13):
        assert result["bytes"] == result["planned"]
        assert "skip_step(): expected engine.step() at every step under DeepSpeed" in result["skip"]
