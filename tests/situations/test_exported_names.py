"""What is exported loads strictly into the plain model: tied tensors, odd buffers, odd shapes, wrappers around
wrappers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import torch_jobs
from tests.support.jobs import engine_for

ORDER = [
    "scale",
    "nothing",
    "shift",
    "same_shift",
    "row",
    "seen",
    "emb.weight",
    "mid.weight",
    "mid.bias",
    "head.weight",
]

SHARDED = ("fsdp", 0, 1, 2, 3)


class Tied(nn.Module):
    """A head tied to its embedding, a buffer of two names, one in float64, a counter, a table that is not saved, a
    parameter without dimensions and one without elements, unless they are sharded: FSDP2 and ZeRO take no such."""

    def __init__(self, kind="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mid, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=False)
        self.head.weight = self.emb.weight
        self.scale = nn.Parameter(torch.tensor([1.5] if kind in SHARDED else 1.5))
        self.nothing = nn.Parameter(torch.zeros(int(kind in ("fsdp", 3)), 6))
        self.register_buffer("shift", torch.zeros(6))
        self.register_buffer("same_shift", self.shift)
        self.register_buffer("row", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(6), persistent=False)

    def forward(self, tokens):
        self.seen += 1
        self.shift.add_(1 + dist.get_rank())
        hidden = torch.relu(self.mid(self.emb(tokens) * self.table)) * self.scale
        return self.head(hidden) + 0 * self.nothing.sum()


def batch(step):
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + step)
    return torch.randint(0, 12, (4,), generator=generator)


def loss_of(model, step):
    return nn.functional.cross_entropy(model(batch(step)), batch(step))


def judged(model, inner, folder, moved, kind):
    """Keys, and how far export and checkpoint are from the replicas' mean, once both have loaded strictly into a plain
    model."""
    import deslo_plugin

    averaged = deslo_plugin.averaged_state_dict(model)
    as_trained = deslo_plugin.averaged_state_dict(model, as_trained=True)
    deslo_plugin.save(folder, model)
    saved = deslo_plugin.load_averaged_state_dict(folder)
    for state in (averaged, saved):
        Tied(kind).load_state_dict(state, strict=True)
    dtypes = {name: value.dtype for name, value in Tied().state_dict().items()}
    assert {name: value.dtype for name, value in as_trained.items()} == dtypes
    shifts = [None] * dist.get_world_size()
    dist.all_gather_object(shifts, inner.shift)
    return {
        "keys": [list(averaged), list(saved)],
        "tied": torch.equal(averaged["emb.weight"], averaged["head.weight"]),
        "alike": all(torch.allclose(value, saved[name], atol=1e-6) for name, value in as_trained.items() if value.ndim),
        "shift": float((averaged["same_shift"] - torch.stack(shifts).mean(0)).abs().max()),
        "seen": int(saved["seen"]),
        "mean": float((averaged["emb.weight"] - moved).abs().max()),
    }


def mean_over_ranks(tensor):
    mean = torch_jobs.whole(tensor).view(12, 6).clone()
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    return mean


def torch_job(kind, folder):
    import deslo_plugin

    inner, where = Tied(kind), {}
    if kind == "fsdp":
        mesh = torch_jobs.mesh_of((2, 2), ("replicate", "shard"))
        torch.distributed.fsdp.fully_shard([inner.emb, inner.head], mesh=mesh["shard"])
        model, where = torch.distributed.fsdp.fully_shard(inner, mesh=mesh["shard"]), {"mesh": mesh}
    else:
        model = inner
        for wrap in kind.split("("):
            model = {
                "plain": lambda m: m,
                "ddp": DistributedDataParallel,
                "compiled": lambda m: torch.compile(m, backend="eager"),
            }[wrap](model)
    periods = {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}
    config = {
        "optimizer": {"params": {"lr": 1e-2, "sync_every": periods}},
        "deslo": {"replica_size": 1} if "ddp" in kind else {},
    }
    optimizer = deslo_plugin.DesLoc(model.parameters(), config)
    deslo_plugin.attach(model, optimizer, **where)
    for step in range(6):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return judged(model, inner, folder, mean_over_ranks(inner.emb.weight), kind)


def engine_job(stage, folder):
    from deepspeed.utils import safe_get_full_fp32_param

    config = {
        "optimizer": {"type": "DesLoc", "params": {"lr": 1e-2, "sync_every": {"params": 4}}},
        "deslo": {"replica_size": 2},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    with engine_for(config, Tied(stage)) as engine:
        for step in range(6):
            engine.backward(loss_of(engine, step))
            engine.step()
        own = engine.module.emb.weight
        moved = mean_over_ranks(safe_get_full_fp32_param(own) if stage else own)
        result = judged(engine, engine.module, folder, moved, stage)
        engine.save_16bit_model(folder, "weights.bin")
        Tied(stage).load_state_dict(torch.load(f"{folder}/weights.bin"), strict=True)
        return result


@pytest.mark.parametrize("kind", ["plain", "ddp", "compiled(ddp", "fsdp", 0, 1, 2, 3])
def test_an_export_has_the_names_of_the_plain_model(four, tmp_path, kind):
    for result in four().run(engine_job if isinstance(kind, int) else torch_job, kind, str(tmp_path / "c")):
        assert result["keys"] == [ORDER, ORDER]
        assert result["tied"] and result["alike"]
        assert result["shift"] == 0 and result["mean"] < 1e-6 and result["seen"] == 6
