"""The examples for torchtitan, Ray Train and SkyPilot are what those take; each is skipped without its library."""

import inspect
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_torchtitan_takes_the_config_and_calls_the_hook():
    """Its Trainer needs a GPU: what it calls is called here as it does."""
    pytest.importorskip("torchtitan.trainer")
    from torchtitan.config import ConfigManager
    from torchtitan.trainer import Trainer

    from examples.torchtitan import llama3_replicas as example

    given = ["--module", "examples.torchtitan.llama3_replicas", "--config", "llama3_debugmodel"]
    config = ConfigManager().parse_args([*given, "--parallelism.data_parallel_replicate_degree", "2"])
    assert config.parallelism.data_parallel_replicate_degree == 2 and config.build.__self__ is config
    assert isinstance(config, example.ReplicaTrainer.Config) and issubclass(example.ReplicaTrainer, Trainer)
    whole = SimpleNamespace(get_mesh=str, get_optional_mesh=str, pp_enabled=False, cp_enabled=False, tp_enabled=False)
    whole.ep_enabled = False
    of_one = example.OfOneReplica(whole)
    assert (of_one.get_mesh("batch"), of_one.get_optional_mesh("loss"), of_one.pp_enabled) == ("fsdp", "fsdp", False)
    steps = inspect.getsource(Trainer.train_step)  # all that its step counts over more than a replica
    assert 'get_mesh("batch")' in steps and 'get_optional_mesh("loss")' in steps
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    config.model_spec.post_optimizer_build_fn([optimizer], [model], whole)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.deslo.steps == 1


def test_ray_takes_the_function():
    pytest.importorskip("ray.train.torch")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from examples.ray import train_ray

    TorchTrainer(
        train_ray.train,
        train_loop_config=train_ray.CONFIG,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(),
    )


def test_the_skypilot_task_is_two_nodes_and_starts_a_script_that_is_there():
    task = yaml.safe_load((ROOT / "examples" / "skypilot" / "two_nodes.yaml").read_text())
    assert task["num_nodes"] == 2 and (ROOT / task["run"].split()[-3]).is_file()
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
