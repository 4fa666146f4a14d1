"""DeepSpeed engines whose replicas share sequences or matrices, run on every rank of a ``Processes`` world."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.engine_configs import ds_config
from tests.support.jobs import engine_for, replica_state
from tests.support.oracle import Setting
from tests.support.parallel_models import BATCH, LENGTH, WIDTH, batch, loss_of, net

SEQUENCE = {  # how DeepSpeed is told of sequence parallelism over two ranks, of as many as there are
    "mesh": lambda: ({}, {"mesh_param": (dist.get_world_size() // 2, 2)}),
    "json": lambda: ({"data_parallel_size": dist.get_world_size() // 2, "sequence_parallel_size": 2}, {}),
    "mpu": lambda: ({}, {"mpu": _mpu()}),
    "transformers": lambda: ({}, {}),
}


def _mpu() -> Any:
    """What ``UlyssesSPAttentionHF.register_with_transformers`` returns."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    forget_sequences()
    parallel_state_sp.initialize_sequence_parallel(2)
    return parallel_state_sp


def forget_sequences() -> None:
    """DeepSpeed makes these groups once in a process, after it has begun."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in jobs.engine_for
    deepspeed.init_distributed("gloo", verbose=False)
    parallel_state_sp._release_sequence_parallel_groups()


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Over (batch, length, heads, width)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores, values)


def attend_together(*layers: Tensor) -> Tensor:
    """Ulysses, over the ranks that DeepSpeed names."""
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import groups

    group = groups._get_sequence_parallel_group()
    return DistributedAttention(attend, group, gather_idx=1)(*layers, 0)


class Heads(nn.Module):
    """Attention of two heads."""

    def __init__(self, attention: Callable):
        super().__init__()
        self.project, self.attention = nn.Linear(WIDTH, 3 * WIDTH), attention

    def forward(self, inputs: Tensor) -> Tensor:
        parts = [each.unflatten(-1, (2, WIDTH // 2)) for each in self.project(inputs).chunk(3, -1)]
        return self.attention(*parts).flatten(-2)


def heads(attention: Callable = attend) -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(nn.LayerNorm(WIDTH), Heads(attention), nn.Linear(WIDTH, WIDTH))


@contextmanager
def ulysses(s: Setting, stage: int, how: str, size: int) -> Iterator[tuple[Any, Callable[[range], None]]]:
    """An engine, and what trains it: each rank has its half of the sequences of its pair, and of their loss."""
    from deepspeed.utils import groups

    block, options = SEQUENCE[how]()
    ds = ds_config(s, stage, deslo={"replica_size": size}) | block | {"train_micro_batch_size_per_gpu": BATCH // 2}
    model, half = heads(attend_together), dist.get_rank() % 2
    first: tuple[int, ...] = ()
    if how == "transformers":
        model, options["mpu"] = shared_llama()
        first = (LENGTH // 2 * half,)
    try:
        with engine_for(ds, model, list(model.parameters()), **options) as engine:
            assert engine.train_batch_size() == BATCH * dist.get_world_size() // 2

            def train(steps: range) -> None:
                for step in steps:
                    for part in (slice(0, 2), slice(2, 4)):
                        inputs, targets = (each[part].chunk(2, 1)[half] for each in batch(dist.get_rank() // 2, step))
                        # DeepSpeed adds up the gradients of a sequence's ranks; its stage 3 takes their mean
                        engine.backward(loss_of(engine(inputs, *first), targets) / (1 if stage == 3 else 2))
                        engine.step()

            yield engine, train
    finally:
        groups.mpu = groups.mesh_device = None  # which DeepSpeed leaves
        if how == "transformers":
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            ALL_ATTENTION_FUNCTIONS.pop("sdpa")  # the one that it put over torch's


def shared_llama() -> tuple[nn.Module, Any]:
    """A Llama whose attention spans two ranks, and the mpu that says so."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    from tests.support.tiny_llama import llama

    forget_sequences()
    model = llama()
    return model, UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", 2, BATCH // 2)


CUT = {  # of parallel_models.net
    "autotp_size": 2,
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": ["1.weight"], "partition_type": "column"},
            {"patterns": ["3.weight"], "partition_type": "row"},
        ],
    },
}


@contextmanager
def autotp(
    s: Setting, stage: int, size: int, build: Callable[[], nn.Module] = net, recorded: bool = False
) -> Iterator[tuple[Any, Callable[[range], None]]]:
    """An engine whose ranks share two layers, or a Llama by its own plan, by pairs that have the same data; the degree
    is in the JSON, or ``recorded`` by tp_model_init."""
    import deepspeed
    from deepspeed.runtime.tensor_parallel import init_utils
    from deepspeed.utils import groups

    cut, model = dict(CUT) if build is net else {"autotp_size": 2}, build()
    if recorded:
        deepspeed.tp_model_init(model, tp_size=cut.pop("autotp_size"), dtype=torch.float32)
    ds = ds_config(s, stage, deslo={"replica_size": size})
    ds |= {"tensor_parallel": cut, "train_micro_batch_size_per_gpu": BATCH // 2}
    try:
        with engine_for(ds, model, list(model.parameters())) as engine:

            def train(steps: range) -> None:
                for step in steps:
                    inputs, targets = batch(dist.get_rank() // 2, step)
                    for part in (slice(0, 2), slice(2, 4)):
                        engine.backward(loss_of(engine(inputs[part]), targets[part]))
                        engine.step()

            yield engine, train
    finally:
        groups._TENSOR_MODEL_PARALLEL_GROUP = init_utils._TP_MODEL_INIT_ARGS = None  # other tests have other degrees


def own_part(name: str, value: Tensor, rank: int) -> Tensor:
    """What ``rank`` has of a flat parameter of the whole model: rows of the first layer, columns of the second."""
    whole, half = value.view(dict(net().named_parameters())[name].shape), slice(4 * (rank % 2), 4 * (rank % 2) + 4)
    return (whole[half] if name.startswith("1.") else whole[:, half] if name == "3.weight" else whole).flatten()


def run_autotp(s: Setting, stage: int, steps: int, size: int = 2, recorded: bool = False) -> dict:
    with autotp(s, stage, size, recorded=recorded) as (engine, train):
        train(range(steps))
        return answer(engine, steps)


def answer(engine: Any, steps: int) -> dict:
    meter, plan = engine.deslo.stats, engine.deslo.plan
    return {
        "states": replica_state(engine),
        "bytes": dict(meter.bytes),
        "planned": {state: sum(plan.bytes_at(t).get(state, 0) for t in range(steps)) for state in meter.bytes},
    }


def run_ulysses(s: Setting, stage: int, how: str, steps: int, size: int = 2) -> dict:
    with ulysses(s, stage, how, size) as (engine, train):
        train(range(steps))
        return answer(engine, steps)


def one_replica_ahead(build: Callable, arguments: tuple, free: int, folder: str) -> int:
    """Replica 0 takes ``free`` steps while the other waits for files that it writes then; then both go on. If anything
    crossed replicas in those steps, replica 0 would wait for ever."""
    done = Path(folder)
    with build(*arguments) as (engine, train):
        train(range(2))  # ZeRO-3 compares its trace in the first ones
        if engine.deslo.topology.replica == 0:
            train(range(2, 2 + free))
            (done / str(dist.get_rank())).touch()
        else:
            deadline = time.monotonic() + 60
            while len(list(done.iterdir())) < engine.deslo.topology.replica_size:
                assert time.monotonic() < deadline, "replica 0 waited for something from another replica"
                time.sleep(0.01)
            train(range(2, 2 + free))
        train(range(2 + free, 4 + free))
        return engine.deslo.steps


def saved(build: Callable, arguments: tuple, folder: str, mode: str) -> dict:
    """Whether what is loaded is what was saved; and the exports."""
    import deslo_plugin

    with build(*arguments) as (engine, train):
        train(range(5))
        whole = deslo_plugin.averaged_state_dict(engine)
        with deslo_plugin.averaged_weights(engine):
            here = replica_state(engine)["params"]
        deslo_plugin.save(folder, engine, mode=mode)
        train(range(5, 9))
        straight = replica_state(engine)
        deslo_plugin.load(folder, engine)
        train(range(5, 9))
        again = replica_state(engine)
        same = all(torch.equal(own, again[state][name]) for state in straight for name, own in straight[state].items())
        return {"whole": whole, "here": here, "same": same, "steps": engine.deslo.steps}


def loaded_whole(s: Setting, stage: int, folder: str) -> dict[str, Tensor]:
    """Parameters of an engine whose ranks cut nothing."""
    import deslo_plugin

    ds = ds_config(s, stage) | {"train_micro_batch_size_per_gpu": BATCH // 2}
    model = net()
    with engine_for(ds, model, list(model.parameters())) as engine:
        deslo_plugin.load(folder, engine)
        return replica_state(engine)["params"]


def cut_llama(s: Setting, stage: int, steps: int, folder: str) -> dict:
    """Trains a Llama that AutoTP cuts by the plan of its class; its average, and what of it was saved."""
    import deslo_plugin
    from tests.support.tiny_llama import llama

    with autotp(s, stage, 2, llama) as (engine, train):
        train(range(steps))
        cut = sum(hasattr(param, "tensor_model_parallel") for param in engine.module.parameters())
        deslo_plugin.save(folder, engine, mode="averaged")
        return {"whole": deslo_plugin.averaged_state_dict(engine), "cut": cut}
