"""Which ranks of a replica share a sequence, or matrices? DeepSpeed is told in the JSON, by a mesh or by an ``mpu``."""

from collections.abc import Mapping
from typing import Any, NoReturn

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups as deepspeed_groups

from deslo_plugin.comm.process_groups import Groups, make_inner_group
from deslo_plugin.errors import ConfigError
from deslo_plugin.frameworks.deepspeed.degrees import at, expect_inside
from deslo_plugin.frameworks.deepspeed.mpu import ReplicaMPU

MESH, MPU = "deepspeed.initialize(mesh_param=...)", "deepspeed.initialize(mpu=...)"
AUTOTP, AUTOTP_STATES = "tensor_parallel.autotp_size", "_configure_tensor_parallel_states"
PIPELINE = ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


def unit_of(ds: Mapping[str, Any], mpu: Any, mesh: Any, groups: Groups) -> ReplicaMPU:
    """What to give DeepSpeed in the place of ``mpu`` and ``mesh``. Collective over all ranks; raises ``ConfigError`` on
    every rank for groups that span replicas, and for what cannot be kept inside one."""
    sequence, degree = _sequence(ds, mpu, mesh, groups), at(ds, AUTOTP) or 1
    if (asked := at(ds, "tensor_parallel.tp.tp_size") or 1) not in (1, degree):
        raise ConfigError(
            "tensor_parallel.tp.tp_size",
            f"{degree}, as autotp_size",
            str(asked),
            "set autotp_size: DeepSpeed cuts nothing by tp_size",
        )
    if degree == 1:
        return ReplicaMPU(groups, sequence=sequence)
    if mpu is not None or mesh is not None:
        raise ConfigError(
            AUTOTP,
            "it alone inside a replica",
            f"{degree} beside " + ("mesh_param=" if mesh is not None else "mpu="),
            "remove one: DeepSpeed's AutoTP takes no other groups than its own",
        )
    if not hasattr(DeepSpeedEngine, AUTOTP_STATES):
        raise ConfigError(AUTOTP, "a DeepSpeed whose AutoTP trains", deepspeed.__version__, "take 0.19.8")
    tensor = _tensor(ds, degree, groups)
    rows = groups.topology.ranks_by_replica
    alike = [row[first::degree] for row in rows for first in range(degree)]
    return ReplicaMPU(groups, tensor=tensor, data=make_inner_group(alike, groups))


def _tensor(ds: Mapping[str, Any], degree: int, groups: Groups) -> dist.ProcessGroup:
    """The ranks that AutoTP cuts matrices for."""
    deepspeed_groups._init_tp_mesh_device(tensor_model_parallel_size=degree)
    group: dist.ProcessGroup = deepspeed_groups.get_tensor_model_parallel_group()
    if group.size() != degree:
        raise ConfigError(
            AUTOTP,
            f"{group.size()}, as in the first engine of this process: DeepSpeed makes these groups once",
            str(degree),
            "use one degree in all engines of a process",
        )
    given = at(ds, "tensor_parallel.tp.tp_group")
    for what, each in ((AUTOTP, group), ("tp_model_init(tp_group=...)", given)):
        if each is not None:
            expect_inside(what, each, groups, "leave tp_group out: autotp_size makes groups of neighbouring ranks")
    return group


def _sequence(ds: Mapping[str, Any], mpu: Any, mesh: Any, groups: Groups) -> dist.ProcessGroup | None:
    """The ranks that have parts of the sequences of this one; None if it has whole ones."""
    where, found = (MESH, mesh.get_group(mesh_dim="sequence_parallel")) if mesh is not None else (MPU, _of_mpu(mpu))
    if found is not None:
        expect_inside(where, found, groups, "let sequences be shared by ranks of one replica, 0 to S - 1 and so on")
    size, asked = found.size() if found is not None else 1, at(ds, "sequence_parallel_size")
    if asked not in (None, "auto", size):
        raise ConfigError(
            "sequence_parallel_size",
            f"{size}, as " + ("the mesh has it" if mesh is not None else "the mpu has it" if mpu else "without groups"),
            repr(asked),
            'give "data_parallel_size" beside it, mesh_param=, or the mpu of UlyssesSPAttentionHF: alone it makes no '
            "groups in DeepSpeed",
        )
    return found if size > 1 else None


def _of_mpu(mpu: Any) -> dist.ProcessGroup | None:
    """The sequence-parallel group of a user's ``mpu``, such as that of UlyssesSPAttentionHF, which also calls it the
    model-parallel one."""

    def refuse(got: str) -> NoReturn:
        raise ConfigError(
            MPU,
            "one with sequence parallelism alone, such as UlyssesSPAttentionHF.register_with_transformers returns",
            got,
            "remove it: replicas have their groups by replica_size, and tensors are cut by tensor_parallel.autotp_size",
        )

    if mpu is None:
        return None
    if not hasattr(mpu, "get_sequence_parallel_group"):
        refuse(getattr(mpu, "__name__", type(mpu).__name__))
    group: dist.ProcessGroup = mpu.get_sequence_parallel_group()
    model = getattr(mpu, "get_model_parallel_group", lambda: None)()
    if model is not None and model.size() > 1 and model is not group:
        refuse(f"model parallelism over {model.size()} ranks")
    for name in PIPELINE:
        if (stages := getattr(mpu, name, lambda: 1)()) > 1:
            refuse(f"{stages} stages of a pipeline")
    return group


def leave_sequence(mpu: Any, mesh: Any) -> None:
    """Leaves what a model that shares sequences asks for in its forward, as DeepSpeed would."""
    if mesh is not None:
        deepspeed_groups.mesh_device = mesh
    if mpu is not None:
        deepspeed_groups.mpu = mpu
