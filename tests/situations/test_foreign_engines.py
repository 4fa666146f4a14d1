"""DeepSpeed engines that are none of ours, meshes and pipelines: left alone, or refused with what to do."""

import os
import threading
import time
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from deslo_plugin.config.load import read_deslo
from deslo_plugin.frameworks.deepspeed.config import refuse_unsupported
from tests.support import engine_error_jobs, jobs
from tests.support.engine_configs import ds_config
from tests.support.jobs import batch, engine_for, loss_of, net
from tests.support.theory import RULES
from tests.support.worlds import Processes

GOOD = ds_config(RULES["des-loc-adam"], 2)
PLAIN = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": {"stage": 2}}


def collectives_of_a_plain_engine(installed: bool) -> list[str]:
    """What ``torch.distributed`` and the accelerator are asked for by an engine without our block, built and
    stepped."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine

    asked: list[str] = []
    kind, names = (
        type(get_accelerator()),
        ("all_gather", "all_gather_object", "broadcast", "all_reduce", "barrier", "new_group"),
    )
    before = {name: getattr(dist, name) for name in names} | {"set_device": kind.set_device}
    ours = DeepSpeedEngine.__init__

    def noted(name: str):
        return lambda *args, **kwargs: (asked.append(name), before[name](*args, **kwargs))[1]

    for name in names:
        setattr(dist, name, noted(name))
    kind.set_device = noted("set_device")
    DeepSpeedEngine.__init__ = ours if installed else ours.__wrapped__
    try:
        model = net()
        with engine_for(PLAIN, model, list(model.parameters())) as engine:
            engine.backward(loss_of(engine, batch(dist.get_rank(), 0, 0)))
            engine.step()
    finally:
        for name in names:
            setattr(dist, name, before[name])
        kind.set_device, DeepSpeedEngine.__init__ = before["set_device"], ours
    return asked


def test_an_engine_without_our_block_asks_for_nothing_that_it_would_not_ask_for_without_us(four):
    four().run(collectives_of_a_plain_engine, True)  # the first in a process makes groups that others find
    assert four().run(collectives_of_a_plain_engine, True) == four().run(collectives_of_a_plain_engine, False)


def only_some_have_the_block(folder: str) -> str:
    """A process that fails ends, and says first what it was told; the launcher then ends the one that is left in
    DeepSpeed."""
    rank, model = dist.get_rank(), net()

    def launcher() -> None:
        while not all((Path(folder) / str(each)).exists() for each in (0, 2, 3)):
            time.sleep(0.1)
        os._exit(1)

    if rank == 1:
        threading.Thread(target=launcher, daemon=True).start()
    try:
        with engine_for(PLAIN if rank == 1 else GOOD, model, list(model.parameters())):
            return "no error"
    except ValueError as error:
        (Path(folder) / str(rank)).write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


def test_ranks_without_the_block_are_named_by_those_that_have_it_and_nobody_hangs(tmp_path):
    world = Processes(4, tmp_path)
    try:
        assert world.outcomes(only_some_have_the_block, str(tmp_path)) == ["the process died"] * 4
        for rank in (0, 2, 3):
            assert (tmp_path / str(rank)).read_text() == (
                'ConfigError: deepspeed.initialize: expected a "deslo" block or a DesLoc optimizer on every rank, '
                "got none on rank(s) [1]; give every rank the same config"
            )
    finally:
        world.close()


def test_a_mesh_of_deepspeeds_own_is_refused_where_it_spans_replicas(four):
    for error in four().run(with_mesh, (1, 4)):
        assert error.startswith(
            "ConfigError: deepspeed.initialize(mesh_param=...): expected groups of consecutive ranks inside a replica "
            "of 2 ranks, got ranks [0, 1, 2, 3]; let sequences be shared by ranks of one replica"
        )
    assert four().run(with_mesh, (4, 1)) == ["no error"] * 4  # which shares nothing


def with_mesh(shape: tuple[int, int]) -> str:
    from deepspeed.utils import groups

    try:
        return engine_error_jobs.raises(GOOD, mesh_param=shape)
    finally:
        groups.mesh_device = None  # which DeepSpeed leaves


def test_mics_of_older_releases_is_refused():
    with pytest.raises(
        ValueError, match="mics_shard_size: expected it unset with DesLoc, got 2; remove it: replica_size with ZeRO-3"
    ):
        refuse_unsupported({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, net(), read_deslo({}))


def pipeline() -> str:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo")
    model = PipelineModule([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)], num_stages=2, loss_fn=torch.nn.MSELoss())
    return engine_error_jobs.raises(GOOD, model=model, groups=list(model.parameters()))


def test_a_pipeline_is_refused_as_a_pipeline(four):
    for error in four().run(pipeline):
        assert (
            "expected a dense model, got a PipelineModule; expert and pipeline parallelism are not supported yet"
            in error
        )


def after_an_engine_with_a_mesh() -> list:
    """A foreign engine's mesh stays DeepSpeed's own; ours, built after it, does not follow it. What is global is as
    before."""
    from deepspeed.utils import groups

    before = groups.mpu, groups.mesh_device
    groups.mesh_device = torch.distributed.init_device_mesh(
        "cpu", (4, 1), mesh_dim_names=("data_parallel", "sequence_parallel")
    )
    theirs = groups.mesh_device
    try:
        with engine_for(GOOD) as engine:
            jobs.train(engine, range(1))
            seen = dist.get_process_group_ranks(engine.optimizer.real_dp_process_group[0])
            return [seen, groups.mpu is before[0], groups.mesh_device is theirs]
    finally:
        groups.mpu, groups.mesh_device = before


def test_the_mesh_of_another_engine_does_not_reach_ours(four):
    assert four().run(after_an_engine_with_a_mesh) == [[[0, 1], True, True]] * 2 + [[[2, 3], True, True]] * 2


def a_nan_of_deepspeeds_own(version: str) -> list[str]:
    """What the next average says of a NaN in the second replica's masters, at stages 0 and 3."""
    from deslo_plugin.frameworks.deepspeed.zero import partitions

    deepspeed_version, deepspeed.__version__, said = deepspeed.__version__, version, []
    try:
        for stage in (0, 3):
            with engine_for(ds_config(RULES["des-loc-adam"], stage)) as engine:
                jobs.train(engine, range(1))
                if engine.deslo.topology.replica == 1:
                    for params in partitions(engine):
                        params[0].data.view(-1)[0] = float("nan")
                try:
                    for step in range(1, 12):
                        engine.backward(loss_of(engine, batch(dist.get_rank(), step, 0)))
                        engine.step()
                    said.append("no error")
                except Exception as error:
                    said.append(f"{type(error).__name__}: {error}")
        return said
    finally:
        deepspeed.__version__ = deepspeed_version


def test_nan_under_a_zero_3_that_gives_it_by_itself_is_said_to_be_deepspeeds(four):
    advice = (
        "; but first of all take DeepSpeed 0.19.8 or later: the ZeRO-3 of 0.18.0 gives NaN on CPUs by itself, at any lr"
    )
    for stage_0, stage_3 in four().run(a_nan_of_deepspeeds_own, "0.18.0"):
        assert "NonFiniteError" in stage_0 and advice not in stage_0
        assert "NonFiniteError" in stage_3 and stage_3.endswith(advice)


def refused_release(version: str, ds: dict = GOOD) -> str:
    deepspeed_version, deepspeed.__version__ = deepspeed.__version__, version
    try:
        return engine_error_jobs.raises(ds)
    finally:
        deepspeed.__version__ = deepspeed_version


@pytest.mark.parametrize("version", ["0.15.4", "0.20.1"])
def test_a_release_of_deepspeed_that_does_not_work_is_refused_with_those_that_do(four, version):
    for error in four().run(refused_release, version):
        assert error == (
            f"ConfigError: deepspeed: expected 0.16 or later, before 0.20, got {version}; "
            "pip install 'deepspeed>=0.16,<0.20'"
        )


@pytest.mark.parametrize("version, refused", [("0.17.5", False), ("0.17.6", True), ("0.18.2", True), ("0.18.3", False)])
def test_a_zero_2_that_drops_micro_batches_by_itself_is_refused_where_there_are_several(four, version, refused):
    said = (
        f"ConfigError: gradient_accumulation_steps: expected 1 with ZeRO-2 of DeepSpeed {version}, which by itself "
        "drops the gradients of all micro-batches but the last, got 2; pip install 'deepspeed>=0.18.3,<0.20', or set "
        "zero_optimization.stage to 1"
    )
    assert four().run(refused_release, version) == [said if refused else "no error"] * 4
    assert four().run(refused_release, version, GOOD | {"gradient_accumulation_steps": 1}) == ["no error"] * 4
    assert four().run(refused_release, version, ds_config(RULES["des-loc-adam"], 1)) == ["no error"] * 4
