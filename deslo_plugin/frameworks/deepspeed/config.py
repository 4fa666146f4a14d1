"""Is this DeepSpeed job one of ours, with which config, and can it work? Decided before anything is built."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from deslo_plugin.config.load import load_config, read_deslo, whole
from deslo_plugin.config.reader import repr_with_type
from deslo_plugin.config.schema import DesloConfig
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.deepspeed.degrees import at
from deslo_plugin.optim.desloc import DesLoc

Build = Callable[[Any], DesLoc]
COMPARED = (  # what of a DeepSpeed JSON changes training and must be equal on all ranks
    "optimizer",
    "deslo",
    "scheduler",
    "zero_optimization",
    "bf16",
    "fp16",
    "gradient_clipping",
    "train_batch_size",
    "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu",
    "communication_data_type",
    "data_types",
    "sequence_parallel_size",
    "data_parallel_size",
    "tensor_parallel",
)


def is_ours(ds: Mapping[str, Any], optimizer: Any) -> bool:
    """Whether the DeepSpeed config or the optimizer asks for us, rightly or not."""
    return "deslo" in ds or (ds.get("optimizer") or {}).get("type") == "DesLoc" or isinstance(optimizer, DesLoc)


def job_of(ds: Mapping[str, Any], optimizer: Any) -> tuple[DesloConfig, Any]:
    """(who averages and how, the optimizer argument for the engine) of a job that is ours.

    Args:
        ds: the DeepSpeed config.
        optimizer: what was passed to ``deepspeed.initialize``: None, an optimizer, or a callable.

    Raises ``ConfigError`` if the two say different things, or misspell ours.
    """
    refuse_misspelt(ds)
    kind, block = (ds.get("optimizer") or {}).get("type"), ds.get("deslo")
    if kind is not None and (isinstance(optimizer, DesLoc) or (kind == "DesLoc" and optimizer is not None)):
        raise ConfigError(
            "deepspeed.initialize",
            "one optimizer",
            f'two: "{kind}" in the JSON and the optimizer argument',
            "remove one of them",
        )
    if kind == "DesLoc":
        config = load_config(ds)
        return config.deslo, lambda params: DesLoc(params, config, armed=False)
    if isinstance(optimizer, DesLoc):
        _take_block(optimizer, block)
        return optimizer.config.deslo, optimizer
    deslo = read_deslo(block)
    if deslo.sync_every is not None and (kind is not None or optimizer is not None):
        return whole(None, deslo).deslo, optimizer
    if not callable(optimizer):
        raise ConfigError(
            '"deslo" block',
            '"optimizer": {"type": "DesLoc", ...} beside it, or "sync_every" in it',
            repr_with_type(kind or type(optimizer).__name__),
            'set the type to "DesLoc", or schedule the states of another optimizer with "sync_every"',
        )

    def build(params: Any) -> DesLoc:
        built = optimizer(params)
        if not isinstance(built, DesLoc):
            raise ConfigError(
                "deepspeed.initialize(optimizer=...)",
                'a callable that returns a DesLoc beside "deslo"',
                type(built).__name__,
                'return a DesLoc or remove the "deslo" block',
            )
        _take_block(built, block)
        return built

    return deslo, build


def _take_block(optimizer: DesLoc, block: Any) -> None:
    """Gives the JSON's ``deslo`` block to an optimizer that the script made, and disarms it until the engine is
    built."""
    if block is not None:
        if optimizer.config.deslo != DesloConfig():
            raise ConfigError(
                "deepspeed.initialize", 'one "deslo" block', "two: the optimizer's own and the JSON's", "keep one"
            )
        deslo = read_deslo(block)
        if deslo.sync_every is not None:
            raise ConfigError("deslo.sync_every", "none beside DesLoc", "one", "give the periods to DesLoc")
        optimizer.config = whole(optimizer.config.optimizer, deslo)
    optimizer.armed = False


def refuse_misspelt(ds: Mapping[str, Any]) -> None:
    """DeepSpeed accepts unknown sections in silence, so a misspelt one would train something else."""
    kind = (ds.get("optimizer") or {}).get("type")
    if kind != "DesLoc" and isinstance(kind, str) and difflib.get_close_matches(kind.lower(), ["desloc"], cutoff=0.75):
        raise ConfigError("optimizer.type", "'DesLoc'", repr_with_type(kind), "did you mean 'DesLoc'?")
    for key in difflib.get_close_matches("deslo", [str(key) for key in ds], n=9, cutoff=0.75):
        if key != "deslo":
            raise ConfigError(
                f'"{key}" block', "a section of DeepSpeed or ours", "an unknown one", "did you mean 'deslo'?"
            )


NOT_INSIDE = {  # a class of DeepSpeed's -> why it does not fit into a replica, and what does
    "PipelineModule": "expert and pipeline parallelism are not supported yet: DeepSpeed lays a PipelineModule's grid "
    "over all ranks and takes no mpu for it; cut stages with torch.distributed.pipelining and attach(stage, mesh=...)",
    "MoE": "expert and pipeline parallelism are not supported yet: DeepSpeed averages the gradients of an expert over "
    "the ranks of all replicas that hold it, and gives the experts of all ranks one name; attach(model, mesh=...) "
    "takes experts in FSDP2",
}
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("zero_optimization.zero_quantized_gradients", bool, "remove it: its all-to-all spans replicas"),
    ("zero_optimization.zero_quantized_weights", bool, "remove it: not supported yet"),
    ("zero_optimization.zenflow", bool, "remove it: not supported yet"),
    (
        "zero_optimization.offload_optimizer.device",
        lambda v: v == "nvme",
        'use "cpu": NVMe swapping is not supported yet',
    ),
    ("zero_optimization.offload_param.device", lambda v: v == "nvme", 'use "cpu": NVMe swapping is not supported yet'),
    (
        "zero_optimization.offload_optimizer.ratio",
        lambda v: v < 1.0,
        "remove it: the rest would be stepped by plain AdamW",
    ),
    ("zero_optimization.offload_optimizer.super_offload", bool, "remove it: not supported yet"),
    ("zero_optimization.elastic_checkpoint", bool, "remove it: not supported yet"),
    ("compile.deepcompile", bool, "remove it: not supported yet"),
    (
        "zero_optimization.mics_shard_size",
        lambda v: v > 0,
        "remove it: replica_size with ZeRO-3 shards inside a replica",
    ),
    ("expert_parallel.enabled", bool, "remove it: expert groups are not supported yet"),
    ("hybrid_engine.enabled", bool, "remove it: not supported yet"),
    ("elasticity.enabled", bool, "remove it: not supported yet"),
    ("data_efficiency.enabled", bool, "remove it: its sampler would give every replica the same data"),
    ("curriculum_learning.enabled", bool, "remove it: its sampler would give every replica the same data"),
    ("managed_gradient_accumulation", lambda v: not v, "remove it: not supported yet"),
    ("sparse_gradients", bool, "remove it: the update needs dense gradients"),
    ("amp.enabled", bool, "use bf16 or fp16: apex is not supported"),
    ("bf16.bf16_master_weights_and_grads", bool, "remove it: momenta and masters are float32"),
    ("bf16.bf16_optimizer_states", bool, 'remove it: "state_dtype": "bfloat16" in optimizer.params does that'),
    ("fp16.fp16_master_weights_and_grads", bool, "remove it: momenta and masters are float32"),
)


def refuse_unsupported(ds: Mapping[str, Any], model: Any, deslo: DesloConfig) -> None:
    """Raises ``ConfigError`` for what would fail or go wrong later, saying what to do instead."""
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    for kind in (kind for kind in NOT_INSIDE if kind in kinds):
        raise ConfigError("deepspeed.initialize(model=...)", "a dense model", f"a {kind}", NOT_INSIDE[kind])
    for path, refused, do in REFUSED:
        value = at(ds, path)
        if value is not None and value != "auto" and refused(value):
            raise ConfigError(path, "it unset with DesLoc", repr(value), do)
    stage = at(ds, "zero_optimization.stage") or 0
    if stage == 0 and at(ds, "fp16.enabled"):
        raise ConfigError(
            "fp16.enabled",
            "ZeRO stage 1, 2 or 3 with fp16",
            "stage 0",
            "use a ZeRO stage or bf16: DeepSpeed 0.19 divides stage-0 gradients by a loss scale that it never applied",
        )
    if at(ds, "torch_autocast.enabled"):
        raise ConfigError(
            "torch_autocast.enabled",
            "it unset with DesLoc",
            "True",
            "use bf16 or fp16: a step that the autocast scaler skips on one replica cannot be seen",
        )
    if deslo.synchronous_steps and at(ds, "zero_optimization.offload_optimizer.device") not in (None, "none"):
        raise ConfigError(
            "deslo.synchronous_steps",
            "0 with offload_optimizer",
            str(deslo.synchronous_steps),
            "remove one: gradients that DeepSpeed offloads are measured for clipping before they could be averaged",
        )
    if deslo.on_nonfinite == "skip" and deslo.sync_every is not None and stage == 0:
        raise ConfigError(
            "deslo.on_nonfinite",
            '"stop" with an optimizer of DeepSpeed\'s own at stage 0',
            '"skip"',
            "remove it, or use a ZeRO stage, where DeepSpeed looks at the gradients, or DesLoc",
        )
    if deslo.on_nonfinite == "skip" and stage in (1, 2) and at(ds, "bf16.enabled"):
        if at(ds, "bf16.check_grad_overflow") is False:
            raise ConfigError(
                "bf16.check_grad_overflow",
                'true with "deslo": {"on_nonfinite": "skip"}',
                "False",
                "remove it, or DeepSpeed applies broken gradients",
            )


def settings_to_compare(ds: Mapping[str, Any]) -> dict[str, Any]:
    """Flat ``{"optimizer.params.lr": ...}`` of all that must be equal on every rank."""
    flat: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in value:
                walk(f"{path}.{key}", value[key])
        elif not isinstance(value, dist.ProcessGroup):  # tp_model_init puts one there
            flat[path] = value

    for section in COMPARED:
        if section in ds:
            walk(section, ds[section])
    return flat
