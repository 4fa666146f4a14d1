r"""torchtitan 0.3 with replicas of its own FSDP ranks: a config module, as its users write them, and no train.py.

torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint $HEAD:29500 -m torchtitan.train \
    --module examples.torchtitan.llama3_replicas --config llama3_debugmodel \
    --parallelism.data_parallel_replicate_degree 2

A replica is what `dp_shard` spans; replicas are `dp_replicate`. AdamW stays torchtitan's own.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchtitan.models.llama3 import config_registry
from torchtitan.trainer import Trainer

import deslo_plugin

DESLO = {"deslo": {"sync_every": {"params": 32, "exp_avg": 96, "exp_avg_sq": 192}}}


class OfOneReplica:
    """torchtitan's ParallelDims, in which tokens and losses of a step are counted over one replica, not over all."""

    def __init__(self, dims: Any):
        self._dims = dims

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dims, name)

    def get_mesh(self, name: Any) -> Any:
        return self._dims.get_mesh("fsdp" if name == "batch" else name)

    def get_optional_mesh(self, name: Any) -> Any:
        return self._dims.get_optional_mesh("fsdp" if name == "loss" else name)


class ReplicaTrainer(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def train_step(self, data_iterator: Any) -> None:
        whole, self.parallel_dims = self.parallel_dims, OfOneReplica(self.parallel_dims)
        try:
            super().train_step(data_iterator)
        finally:
            self.parallel_dims = whole

    def train(self) -> None:
        super().train()
        deslo_plugin.save(Path(self.config.dump_folder) / "deslo", self.model_parts[0])  # every rank


def attach(optimizers: Any, model_parts: Any, parallel_dims: Any) -> None:
    """What torchtitan calls once model and optimizers are built: ``ModelSpec.post_optimizer_build_fn``."""
    if parallel_dims.pp_enabled or parallel_dims.cp_enabled or parallel_dims.tp_enabled or parallel_dims.ep_enabled:
        raise ValueError("this example is FSDP in a replica; docs/parallelism.md has the other kinds")
    for optimizer in optimizers:
        deslo_plugin.attach(model_parts[0], optimizer, DESLO)


def llama3_debugmodel() -> ReplicaTrainer.Config:
    made = config_registry.llama3_debugmodel()
    made.model_spec.post_optimizer_build_fn = attach
    config = ReplicaTrainer.Config(**{each.name: getattr(made, each.name) for each in fields(made) if each.init})
    config.parallelism.spmd_backend = "partial_dtensor"  # one 2-D mesh, replicas x shards
    config.training.disable_cuda_graphs = True  # an average lands in the step
    config.checkpoint.enable = False  # it would mix replicas: train() saves
    config.validator.enable = False  # it counts over all replicas
    return config
