"""What people attach: models and optimizers in every wrapper, ranks that never seeded, attachments without effect."""

import contextlib
import copy
import logging
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import batch, loss_of, net
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch_jobs import mesh_of, whole

import deslo_plugin
from deslo_plugin import log
from deslo_plugin.attachment import attachment_of
from deslo_plugin.checkpoint import resharding

EVERY = {"params": 3, "exp_avg": 3, "exp_avg_sq": 3}


def config(**deslo: Any) -> dict:
    return {"deslo": {"average_at": "after_step", "sync_every": EVERY} | deslo}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@contextlib.contextmanager
def heard():
    """The package's messages on this rank."""
    logger, lines = logging.getLogger("deslo_plugin"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def beside_the_banner(lines: list[str]) -> list[str]:
    """Without what every attachment says: its plan, and what ``state_dict()`` will do."""
    return [line for line in lines if "replica(s) of" not in line and "while replicas differ. To save" not in line]


def error_of(act) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def train(model: nn.Module, optimizer: Any, steps: range, seat: int | None = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(dist.get_rank() if seat is None else seat, step, 0)).backward()
        optimizer.step()


class Inside(nn.Module):
    """A user's module that wraps the network itself."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


class _FabricModule(nn.Module):
    """As Lightning Fabric's: both what runs and what the user wrote."""

    def __init__(self, forward_module: nn.Module, original: nn.Module):
        super().__init__()
        self._forward_module, self._original_module = forward_module, original

    def forward(self, inputs):
        return self._forward_module(inputs)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_parts(model: nn.Sequential) -> nn.Module:
    return Inside(DistributedDataParallel(model[0]), nn.Tanh(), DistributedDataParallel(model[2]))


DDP = DistributedDataParallel
WRAPPED = {
    "compiled": compiled,
    "compiled(DDP)": lambda model: compiled(DDP(model)),
    "DDP(compiled)": lambda model: DDP(compiled(model)),
    "DataParallel": DataParallel,
    "DDP inside": lambda model: Inside(DDP(model)),
    "two DDPs inside": in_parts,
    "Fabric": lambda model: _FabricModule(DDP(model), model),
}


def wrapped(kind: str) -> dict:
    """Trained as it was wrapped: apart after 2 steps, one after 3, and in between no way around the guard."""
    inner = net()
    model = WRAPPED[kind](inner)
    optimizer = adamw(model)
    attachment = deslo_plugin.attach(model, optimizer, config(replica_size=1))
    train(model, optimizer, range(2))
    apart = [whole(p) for p in inner.parameters()]
    levels = [model, inner, inner[0], *(module for module in model.modules() if isinstance(module, DDP))]
    refusals = [error_of(level.state_dict) for level in levels]
    with deslo_plugin.local_state_dict():
        own = len(inner.state_dict())
    names = sorted(deslo_plugin.averaged_state_dict(model))
    train(model, optimizer, range(2, 3))
    return {
        "apart": apart,
        "one": [whole(p) for p in inner.parameters()],
        "refusals": refusals,
        "own": own,
        "names": names,
        "replicas": attachment.topology.replicas,
        "failed": attachment.stats.failed_checks,
    }


@pytest.fixture(scope="module")
def plain(four):
    return four().run(_bare)


def _bare() -> list:
    model = net()
    optimizer = adamw(model)
    deslo_plugin.attach(model, optimizer, config())
    train(model, optimizer, range(2))
    apart = [whole(p) for p in model.parameters()]
    train(model, optimizer, range(2, 3))
    return [apart, [whole(p) for p in model.parameters()]]


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_trains_as_the_bare_one_and_every_level_is_guarded(four, plain, kind):
    for (apart, one), result in zip(plain, four().run(wrapped, kind)):
        assert all(map(torch.equal, apart, result["apart"])) and all(map(torch.equal, one, result["one"]))
        assert all(
            "state_dict(): expected one model, got one of 4 replicas" in refusal for refusal in result["refusals"]
        )
        assert result["own"] == 4 and result["failed"] == 0 and result["replicas"] == 4
        if kind not in ("DDP inside", "two DDPs inside"):
            assert result["names"] == ["0.bias", "0.weight", "2.bias", "2.weight"]


def _fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return model, adamw(model)


def _zero_redundancy(model):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return DDP(model), ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2)


def _post_local_sgd(model):
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    return model, PostLocalSGDOptimizer(adamw(model), PeriodicModelAverager(period=4))


def _replicated(model):
    from torch.distributed._composable.replicate import replicate

    return replicate(model), adamw(model)


def _in_backward(model):
    from torch.distributed.optim import _apply_optimizer_in_backward

    optimizer = adamw(model)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 1e-2})
    return model, optimizer


def _sync_batch_norm(model):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    return model, adamw(model)


def _sharded_twice(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh_of((2, 2), ("replicate", "shard"))["shard"])
    return Inside(model[0], DDP(model[2])), adamw(model)


class DistributedFusedAdam(torch.optim.Adam):
    """The name of one that shards its states."""


REFUSED = {
    "FSDP1": (_fsdp1, "FullyShardedDataParallel.*fully_shard"),
    "ZeroRedundancyOptimizer": (_zero_redundancy, "ZeroRedundancyOptimizer.*fully_shard"),
    "PostLocalSGDOptimizer": (_post_local_sgd, "PostLocalSGDOptimizer.*averages parameters by itself"),
    "replicate": (_replicated, r"replicate\(\).*DistributedDataParallel"),
    "optimizer in backward": (_in_backward, "stepped in the backward"),
    "SyncBatchNorm": (
        _sync_batch_norm,
        "attach.model. 1: expected SyncBatchNorm over the ranks of one replica.*use BatchNorm",
    ),
    "DDP beside FSDP2": (_sharded_twice, "expected DDP or fully_shard, got both"),
    "apex": (lambda model: (model, DistributedFusedAdam(model.parameters())), "DistributedFusedAdam.*shards states"),
    "a list of models": (lambda model: ([model], adamw(model)), "expected a torch.nn.Module, got list"),
    "no optimizer": (lambda model: (model, object()), "expected a torch.optim.Optimizer, got object"),
}


def refused() -> dict[str, str]:
    """By kind, the error of attaching it."""
    errors = {}
    for kind, (build, _) in REFUSED.items():
        model, optimizer = build(net())
        errors[kind] = error_of(lambda: deslo_plugin.attach(model, optimizer, config(replica_size=1)))
        assert not hasattr(optimizer, "deslo")
    return errors


def test_an_attachment_is_found_by_the_model_in_its_wrappers_and_by_the_optimizer():
    model = net()
    optimizer = adamw(model)
    attachment = deslo_plugin.attach(model, optimizer, config())
    assert all(attachment_of(target) is attachment for target in (model, DataParallel(model), optimizer))
    assert all(attachment_of(target) is None for target in (copy.deepcopy(model), model[0], adamw(net()), None))


def test_what_shards_or_communicates_by_itself_is_refused_on_every_rank(four):
    for errors in four().run(refused):
        for kind, (_, message) in REFUSED.items():
            assert re.search(f"^ConfigError: .*{message}", errors[kind]), errors[kind]


def refused_on_one() -> str:
    model = net()
    optimizer = adamw(model) if dist.get_rank() != 2 else DistributedFusedAdam(model.parameters())
    return error_of(lambda: deslo_plugin.attach(model, optimizer, config()))


def test_what_one_rank_alone_may_not_attach_is_refused_on_all(four):
    assert all("DistributedFusedAdam" in error and "[2]" in error for error in four().run(refused_on_one))


def deepspeed_by_hand(stage: int) -> list[str]:
    """attach() called with an engine, its module, and the optimizers around and in it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        },
    )
    try:
        return [
            error_of(lambda: deslo_plugin.attach(target, optimizer, config()))
            for target in (engine, engine.module)
            for optimizer in (engine.optimizer, engine.basic_optimizer)
        ]
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_deepspeed_engine_is_sent_to_the_two_blocks_of_its_json(four, stage):
    for errors in four().run(deepspeed_by_hand, stage):
        assert all("the two blocks" in error and "in the DeepSpeed JSON" in error for error in errors), errors


def unseeded(kind: str, initial: str | None = None) -> dict:
    """Every rank draws its own model, and has its own persistent buffer."""
    from torch.distributed.fsdp import fully_shard

    rank, mesh = dist.get_rank(), mesh_of((2, 2), ("replicate", "shard"))
    model, options = net(seed=rank), {}
    model.register_buffer("table", torch.full((3,), float(rank)))
    model.register_buffer("count", torch.tensor(rank))
    model.register_buffer("own", torch.tensor(rank), persistent=False)
    deslo = {} if initial is None else {"initial_params": initial}
    if kind == "mixed fsdp":
        fully_shard(model[2], mesh=mesh["shard"])
        options = {"mesh": mesh}
    elif kind == "fsdp":
        fully_shard(model, mesh=mesh["shard"])
    elif kind == "ddp of a replica":
        model = DDP(model, broadcast_buffers=False)
        with torch.no_grad():
            model.module[0].weight.add_(rank)  # what DDP had made equal
        deslo |= {"replica_size": 2}
    optimizer = adamw(model)
    with heard() as lines:
        error = error_of(lambda: deslo_plugin.attach(model, optimizer, config(**deslo), **options))
    inner = getattr(model, "module", model)
    return {
        "error": error,
        "lines": [line for line in lines if "differed" in line],
        "own": int(inner.own),
        "state": [*map(whole, inner.parameters()), inner.table.clone(), inner.count.clone()],
    }


@pytest.mark.parametrize("kind", ["plain", "ddp of a replica", "fsdp", "mixed fsdp"])
def test_ranks_that_never_seeded_start_from_replica_0_which_is_said_once(four, kind):
    results = four().run(unseeded, kind)
    assert [result["error"] for result in results] == ["no error"] * 4
    for result in results:
        assert all(map(torch.equal, result["state"], results[0]["state"]))
    assert int(results[0]["state"][-1]) == 0 and [result["own"] for result in results] == [0, 1, 2, 3]
    assert "on rank(s) [1, 2, 3]" in " ".join(results[0]["lines"]) and "0.weight" in " ".join(results[0]["lines"])
    assert "initial_params" in results[0]["lines"][0] and not any(result["lines"] for result in results[1:])


def test_check_refuses_and_broadcast_says_nothing(four):
    assert all(
        "initial value of parameter 0.weight" in each["error"] for each in four().run(unseeded, "plain", "check")
    )
    for result in four().run(unseeded, "plain", "broadcast"):
        assert result["error"] == "no error" and not result["lines"] and int(result["state"][-1]) == 0


def deepspeed_unseeded(stage: int, same_data: bool = False) -> list:
    from jobs import engine_for, replica_state

    ds = {
        "optimizer": {"type": "DesLoc", "params": {"sync_every": {"params": 4}}},
        "deslo": {"replica_size": 2},
        "zero_optimization": {"stage": stage},
    }
    with engine_for(ds, net(seed=dist.get_rank())) as engine:
        params = [*replica_state(engine, [])["params"].values()]
        for step in range(6):
            engine.backward(loss_of(engine, batch(0 if same_data else dist.get_rank(), step, 0)))
            engine.step()
        return [params, engine.deslo.check()]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_that_never_seeded_start_from_replica_0_under_deepspeed(four, stage):
    results = four().run(deepspeed_unseeded, stage)
    first, _ = results[0]
    assert [found for _, found in results] == [[]] * 4 and all(
        all(map(torch.equal, params, first)) for params, _ in results
    )
    assert torch.equal(first[0].flatten(), net(seed=0)[0].weight.flatten())


def test_the_same_data_on_every_rank_is_seen_under_deepspeed(four):
    for _, (found,) in four().run(deepspeed_unseeded, 2, True):
        assert "all ranks see the same data" in found


def plain_parts(kind: str) -> str:
    """Other values on each rank of a replica, the same in all replicas: experts, or tensor parallelism by hand."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    mesh = mesh_of((2, 2), ("replicate", "shard"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.add_(mesh.get_local_rank("shard"))
    ignored = {model[0].weight}
    if kind == "DTensor":
        model[0].weight = nn.Parameter(DTensor.from_local(model[0].weight.detach(), mesh["shard"], [Shard(0)]))
        ignored = {model[0].weight}
    if kind != "by hand":
        fully_shard(model, mesh=mesh["shard"], ignored_params=ignored)
    return error_of(lambda: deslo_plugin.attach(model, adamw(model), config(), mesh=mesh))


def test_parts_in_plain_tensors_are_refused_and_dtensors_are_not(four):
    for kind in ("by hand", "experts"):
        for error in four().run(plain_parts, kind):
            assert re.search(
                "parameter 0.weight: expected one value on the ranks of a replica, or a DTensor, got another on "
                "rank.s. .1, 3.; make it a DTensor",
                error,
            )
    assert four().run(plain_parts, "DTensor") == ["no error"] * 4


def beside_fsdp() -> list[str]:
    from torch.distributed.fsdp import fully_shard

    mesh, model = mesh_of((2, 2), ("replicate", "shard")), net()
    fully_shard(model[2], mesh=mesh["shard"])
    with heard() as lines:
        deslo_plugin.attach(model, adamw(model), config(), mesh=mesh)
    return lines


def test_trained_parameters_beside_fsdp_are_named(four):
    lines, *_ = four().run(beside_fsdp)
    assert sum("0.weight, 0.bias are trained and not sharded" in line for line in lines) == 1


def test_the_torch_before_2_12_has_one_param_group_for_each_module(monkeypatch):
    class Older(nn.Module):
        def _get_fsdp_state(self):
            return type("State", (), {"_fsdp_param_group": self.group})

    sharded, empty = Older(), Older()
    sharded.group, empty.group = "group", None
    monkeypatch.setattr(resharding, "FSDPModule", Older)
    assert list(resharding.param_groups(nn.Sequential(sharded, empty))) == ["group"]


def stages() -> str:
    """Ranks 1 and 3 hold another stage of a pipeline than 0 and 2."""
    mesh = mesh_of((2, 2), ("replicate", "stage"))
    stage = nn.Linear(6, 3) if mesh.get_local_rank("stage") else nn.Linear(3, 6)
    error = error_of(lambda: deslo_plugin.attach(stage, adamw(stage), config()))
    optimizer = adamw(stage)
    attachment = deslo_plugin.attach(stage, optimizer, config(), process_group=mesh["replicate"].get_group())
    return f"{error} / {attachment.topology.replicas}"


def test_stages_of_a_pipeline_are_told_the_way_that_works(four):
    for answer in four().run(stages):
        assert re.search(r"process_group=mesh\[.replicate.\].get_group\(\).* / 2$", answer)


def in_two_dimensions(kind: str) -> dict:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    if kind == "hsdp x tp":
        mesh = mesh_of((2, 1, 2), ("dp_replicate", "dp_shard", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])
    else:
        mesh = mesh_of((2, 2), ("replicate", "shard"))
        fully_shard(model[0], mesh=mesh["shard"])
        fully_shard(model[2], mesh=mesh["replicate", "shard"])
    optimizer = adamw(model)
    deslo_plugin.attach(model, optimizer, config(), mesh=mesh)
    train(model, optimizer, range(4), seat=dist.get_rank() // 2)
    return {name: whole(param) for name, param in model.named_parameters()}


@pytest.mark.parametrize("kind", ["hsdp x tp", "two meshes"])
def test_models_on_more_than_one_mesh_train_as_replicas_of_one_process(four, kind):
    replicas = [net(), net()]
    optimizers = [adamw(model) for model in replicas]
    for step in range(4):
        for seat, (model, optimizer) in enumerate(zip(replicas, optimizers)):
            train(model, optimizer, range(step, step + 1), seat)
        if step == 2:
            for mine, theirs in zip(*(model.parameters() for model in replicas)):
                states = [
                    [p.detach(), *(o.state[p][name] for name in ("exp_avg", "exp_avg_sq"))]
                    for p, o in zip((mine, theirs), optimizers)
                ]
                for a, b in zip(*states):
                    b.copy_(a.copy_((a + b) / 2))
    for rank, result in enumerate(four().run(in_two_dimensions, kind)):
        for name, param in replicas[rank // 2].named_parameters():
            assert torch.allclose(result[name], param.detach().flatten(), atol=1e-6), (name, rank)


def without_effect(kind: str) -> dict:
    """Six steps of something that looks attached; what was said, and what ``check`` says on this rank."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.manual_seed(0)
    model = net()
    outer = DDP(model) if kind in ("the module inside", "same data", "fine") else model
    optimizer, config_ = (
        torch.optim.AdamW(model.parameters(), lr=0.0 if kind == "rate 0" else 1e-2),
        config(replica_size=1),
    )
    if kind == "half":
        optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    other = torch.optim.SGD(model[2].parameters(), lr=1e-2)
    if kind == "warm-up":
        config_["deslo"]["synchronous_steps"] = 2
    if kind == "met before an average":
        config_["deslo"]["average_at"] = "before_step"
    if kind == "stepped elsewhere":
        other = torch.optim.SGD(model.parameters(), lr=1e-2)
    with heard() as lines:
        attachment = deslo_plugin.attach(model if kind == "the module inside" else outer, optimizer, config_)
        if kind == "attached before DDP":
            outer = DDP(model)
        if kind == "states made beforehand":
            get_optimizer_state_dict(model, optimizer)
        for step in range(6):
            if kind == "met before an average" and step == 3:
                deslo_plugin.sync_replicas(outer)
            model.zero_grad()
            loss_of(outer, batch(0 if kind == "same data" else dist.get_rank(), step, 0)).backward()
            if kind != "stepped elsewhere":
                optimizer.step()
            if kind in ("half", "stepped elsewhere"):
                other.step()
        found = attachment.check()
    return {"said": beside_the_banner(lines), "found": found, "failed": attachment.stats.failed_checks}


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            "the module inside",
            "equal after 3 steps, before any average: gradients still meet.*Attach what DDP.model. returned",
        ),
        ("attached before DDP", "equal after 3 steps, before any average"),
        ("same data", "equal after 3 steps, before any average.*DistributedSampler"),
        ("half", "2.weight, 2.bias require gradients and are in no attached optimizer"),
        ("stepped elsewhere", "a step of SGD moves parameters of AdamW, which is attached and not stepped"),
    ],
)
def test_an_attachment_without_effect_is_said_once(four, kind, message):
    results = four().run(without_effect, kind)
    assert len([line for line in results[0]["said"] if re.search(message, line)]) == 1
    assert not any(result["said"] for result in results[1:])
    for result in results:
        assert (
            result["found"] == results[0]["found"]
            and re.search(message, " ".join(result["found"]))
            and result["failed"] >= 1
        )


@pytest.mark.parametrize("kind", ["fine", "rate 0", "warm-up", "states made beforehand", "met before an average"])
def test_nothing_is_said_of_what_works(four, kind):
    assert four().run(without_effect, kind) == [{"said": [], "found": [], "failed": 0}] * 4


def resumed_when_an_average_is_due(kind: str, folder: str) -> list[str]:
    """Three steps, after which an average of parameters is due, and three more in another job that loads them."""
    said = []
    for job in ("first", "second"):
        model = net()
        optimizer = (
            deslo_plugin.DesLoc(model.parameters(), lr=1e-2, sync_every={"params": 3})
            if kind == "desloc"
            else adamw(model)
        )
        with heard() as lines:
            deslo_plugin.attach(model, optimizer, *([] if kind == "desloc" else [config(average_at="before_step")]))
            if job == "second":
                deslo_plugin.load(folder, model)
            train(model, optimizer, range(3), seat=dist.get_rank())
            if job == "first":
                deslo_plugin.save(folder, model)
        said += beside_the_banner(lines)
    return said


@pytest.mark.parametrize("kind", ["stock", "desloc"])
def test_nothing_is_said_of_a_checkpoint_that_was_saved_when_an_average_was_due(four, tmp_path, kind):
    assert four().run(resumed_when_an_average_is_due, kind, str(tmp_path / "3")) == [[]] * 4


def moved_by_hand() -> list[list[str]]:
    model = net()
    optimizer = adamw(model)
    attachment = deslo_plugin.attach(model, optimizer, config())
    found = [attachment.check()]
    with torch.no_grad():
        model[0].weight.add_(1.0 + (dist.get_rank() == 3))
    return [*found, attachment.check(), attachment.check()]


def test_check_sees_parameters_that_moved_without_a_step_and_replicas_that_differ(four):
    for first, second, third in four().run(moved_by_hand):
        assert first == [] and any("without a step" in each for each in second)
        assert any("rank(s) [3] differ from replica 0" in each for each in second) and "without a step" not in third[0]


def banner_of_stock() -> tuple[list[str], dict]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    blocks = {"deslo": {"sync_every": {"params": 32, "momentum_buffer": 64}}}
    with heard() as lines:
        attachment = deslo_plugin.attach(model, optimizer, blocks)
        train(model, optimizer, range(2))
    return lines, {"flight": attachment.plan.flight_bytes}


def test_the_banner_of_a_stock_optimizer_counts_its_momenta_from_the_start(four):
    (lines, plan), *_ = four().run(banner_of_stock)
    lines = [line for line in lines if "replica(s) of" in line]
    assert len(lines) == 1 and "momentum_buffer: every 64 steps (given)" in lines[0] and "21.3 times fewer" in lines[0]
    assert f"up to {plan['flight']:,} bytes" in lines[0]


HEARD = """
import logging
from deslo_plugin.log import announce, log_rank0, logger

log_rank0("first: nobody has set up logging")
logging.basicConfig(level=logging.WARNING, format="user: %(message)s")
announce("second: its first line\\nand the rest")
log_rank0("third: not asked for")
logging.getLogger().setLevel(logging.INFO)
announce("fourth: its first line\\nand the rest")
assert not logger.handlers and logger.propagate and logger.level == logging.NOTSET
"""


def test_messages_are_seen_once_with_and_without_logging_of_the_users():
    heard = subprocess.run([sys.executable, "-c", HEARD], capture_output=True, text=True, timeout=900, check=True)
    assert heard.stderr.splitlines() == [
        "first: nobody has set up logging",
        "user: second: its first line",
        "user: fourth: its first line",
        "and the rest",
    ]


def test_the_last_words_come_from_the_first_rank_alone(monkeypatch, caplog):
    monkeypatch.setattr(log.dist, "is_initialized", lambda: False)  # the process group was destroyed
    for rank in range(4):
        monkeypatch.setattr(log, "_rank", rank)
        log.log_rank0(f"summary of rank {rank}", logging.WARNING)
    assert "summary of rank 0" in caplog.text and "rank 1" not in caplog.text and "rank 3" not in caplog.text


def two_attached(kind: str) -> dict:
    """A generator and a discriminator, each with an optimizer of its own, in one module or apart."""
    a, b = net(1), net(2)
    models = [DDP(a), DDP(b)] if kind == "apart" else [Inside(DDP(a), nn.Linear(3, 6), DDP(b))] * 2
    with heard() as lines:
        optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (a, b)]
        if kind != "apart":
            optimizers[0].add_param_group({"params": models[0].parts[1].parameters()})
        attachments = [deslo_plugin.attach(model, o, config(replica_size=1)) for model, o in zip(models, optimizers)]
        for step in range(3):
            for model, optimizer in zip(models, optimizers):
                loss_of(model, batch(dist.get_rank(), step, 0)).backward()
                optimizer.step()
                optimizer.zero_grad()
    return {
        "said": beside_the_banner(lines),
        "one": [whole(p) for p in (*a.parameters(), *b.parameters())],
        "found": attachments[1].check(),
    }


@pytest.mark.parametrize("kind", ["apart", "in one module"])
def test_two_models_with_an_optimizer_each_are_averaged_both(four, kind):
    results = four().run(two_attached, kind)
    for result in results:
        assert (
            result["said"] == [] and result["found"] == [] and all(map(torch.equal, result["one"], results[0]["one"]))
        )


def late_attach() -> list[str]:
    model = net()
    first, second = torch.optim.AdamW(model[0].parameters()), torch.optim.AdamW(model[2].parameters())
    deslo_plugin.attach(model, first, config())
    train(model, first, range(2))
    errors = [error_of(lambda: deslo_plugin.attach(model, second, config()))]
    deslo_plugin.sync_replicas(model)
    return [*errors, error_of(lambda: deslo_plugin.attach(model, second, config()))]


def test_an_optimizer_that_comes_late_does_not_set_replicas_back(four):
    for error, after in four().run(late_attach):
        assert (
            "attach every optimizer before the first step, or call deslo_plugin.sync_replicas(model)" in error
            and after == "no error"
        )
