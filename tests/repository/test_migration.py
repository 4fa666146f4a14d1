"""docs/migration.md: every block "after" trains and averages on four ranks; those before name what libraries have."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.jobs import batch, engine_for, loss_of, net, train

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
SECTIONS = {section.splitlines()[0]: section for section in PAGE.split("\n## ")[1:]}
ACCELERATE, POST_LOCAL, DILOCO, HSDP = (
    next(title for title in SECTIONS if word in title) for word in ("Accelerate", "post-local", "DiLoCo", "HSDP")
)
TORCH = {title: section for title, section in SECTIONS.items() if "```python" in section}
DEEPSPEED = {title: section for title, section in SECTIONS.items() if "```json" in section}
STEPS = 32


def blocks(section: str, language: str) -> tuple[str, str]:
    """The block before and the one after."""
    before, after = re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    return before, after


def given(title: str) -> dict[str, Any]:
    """What a snippet finds there, in each section what its text says."""
    import deslo_plugin
    from tests.support.accelerate_jobs import accelerator_for

    model = net()
    names = {
        "torch": torch,
        "deslo_plugin": deslo_plugin,
        "model": model,
        "loss_of": loss_of,
        "batches": [batch(dist.get_rank(), step, 0) for step in range(STEPS)],
    }
    if title == ACCELERATE:
        names["accelerator"] = accelerator_for("ddp", gradient_accumulation_steps=1)
        names["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if title == POST_LOCAL:
        names["model"] = torch.nn.parallel.DistributedDataParallel(model)
    if title == DILOCO:
        names["manager"] = None  # the same over a fixed world, as the page says
    if title == HSDP:
        names |= {
            "device": "cpu",
            "init_device_mesh": importlib.import_module("torch.distributed.device_mesh").init_device_mesh,
            "fully_shard": importlib.import_module("torch.distributed.fsdp").fully_shard,
        }
    return names


def trained(title: str, snippet: str) -> int:
    """Runs ``snippet``, and a loop where it has none; the bytes that its parameters have sent."""
    from deslo_plugin.attachment import attachment_of

    names = given(title)
    exec(snippet, names)
    if "for batch in" not in snippet:
        for each in names["batches"]:
            loss_of(names["model"], each).backward()
            names["optimizer"].step()
            names["optimizer"].zero_grad()
    attachment = attachment_of(names["model"])
    assert attachment.steps == STEPS and all(bool(param.isfinite().all()) for param in names["model"].parameters())
    return attachment.stats.bytes["params"]


@pytest.mark.parametrize("title", TORCH)
def test_a_script_after_trains_and_averages(four, title):
    snippet = blocks(SECTIONS[title], "python")[1].replace('"replica_size": 8', '"replica_size": 2')
    snippet = snippet.replace('"params": 32', '"params": 16').replace(
        '"synchronous_steps": 100', '"synchronous_steps": 8'
    )
    assert all(sent > 0 for sent in four().run(trained, title, snippet))


def trained_by_deepspeed(config: dict) -> int:
    with engine_for(config) as engine:
        train(engine, range(4))
        return engine.deslo.stats.bytes["params"]


@pytest.mark.parametrize("title", DEEPSPEED)
def test_a_config_after_trains_and_averages(four, title):
    config = json.loads(blocks(SECTIONS[title], "json")[1])
    config["deslo"]["replica_size"] = 2
    periods = config["deslo"].get("sync_every") or config["optimizer"]["params"]["sync_every"]
    periods |= {"params": 2, "exp_avg": 3, "exp_avg_sq": 4}
    if config["optimizer"]["type"] == "AdamW":  # DeepSpeed's own would be compiled at first
        config["optimizer"]["params"]["torch_adam"] = True
    if "synchronous_steps" in config["deslo"]:
        config["deslo"]["synchronous_steps"] = 1
    assert all(sent > 0 for sent in four().run(trained_by_deepspeed, config))


def local_sgd(before: str, after: str) -> tuple[list, list]:
    """The parameters that each of the two snippets comes to."""
    from accelerate.local_sgd import LocalSGD

    results = []
    for snippet in (before, after):
        names = given(ACCELERATE) | {"LocalSGD": LocalSGD}
        if snippet is before:
            names["model"], names["optimizer"] = names["accelerator"].prepare(names["model"], names["optimizer"])
        exec(snippet, names)
        results.append([param.detach().clone() for param in names["model"].parameters()])
    return results[0], results[1]


def test_local_sgd_comes_to_the_same_with_its_settings(four):
    before, after = blocks(SECTIONS[ACCELERATE], "python")
    same = '"average_at": "after_step", "sync_every": {"params": 8, "exp_avg": None, "exp_avg_sq": None}'
    after = re.sub(r'"sync_every": \{.*?\}', same, after)
    for theirs, ours in four().run(local_sgd, before, after):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(theirs, ours))


@pytest.mark.parametrize(
    "module, names",
    [
        ("accelerate.local_sgd", ["LocalSGD"]),
        ("torch.distributed.optim", ["PostLocalSGDOptimizer"]),
        ("torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook", ["PostLocalSGDState", "post_localSGD_hook"]),
        ("torch.distributed.algorithms.model_averaging.averagers", ["PeriodicModelAverager"]),
        ("torchft.local_sgd", ["DiLoCo"]),
    ],
)
def test_what_stands_before_is_called_so_where_it_is(module, names):
    found = pytest.importorskip(module)
    assert all(hasattr(found, name) and name in PAGE for name in names)
