"""Attachments without effect, and what a rank is told of an attachment: once, and nothing of what works."""

import logging
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deslo_plugin
from deslo_plugin import log
from tests.support.attaching import DDP, Inside, adamw, config, heard, train
from tests.support.jobs import batch, loss_of, net
from tests.support.torch_jobs import whole


def beside_the_banner(lines: list[str]) -> list[str]:
    """Without what every attachment says: its plan, and what ``state_dict()`` will do."""
    return [line for line in lines if "replica(s) of" not in line and "while replicas differ. To save" not in line]


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
