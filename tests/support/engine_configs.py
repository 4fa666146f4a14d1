"""DeepSpeed configs of the job in jobs.py, and how its results are compared."""

from tests.support.oracle import Setting, blocks
from tests.support.theory import ACCUMULATION, CLIP, RULES

SHARDS = 2
SYNC_EVERY = {"params": 3, "exp_avg": 6, "exp_avg_sq": 12}
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.0}


def ds_config(s: Setting, stage: int, **more) -> dict:
    deslo = {"replica_size": SHARDS} | more.pop("deslo", {})
    return (
        blocks(s, **deslo)
        | {
            "zero_optimization": {"stage": stage},
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": CLIP,
        }
        | more
    )


def assert_same_states(some: list[dict], others: list[dict], tolerance: float) -> None:
    for one, other in zip(some, others, strict=True):
        for state, tensors in one["states"].items():
            for name, tensor in tensors.items():
                error = (tensor - other["states"][state][name]).abs().max()
                assert error <= tolerance, f"{state} of {name}: {error:.3g}"


def stock_ds(stage: int, **more) -> dict:
    ds = ds_config(RULES["des-loc-adam"], stage) | more
    ds["optimizer"] = {"type": "AdamW", "params": ADAMW | {"torch_adam": True}}
    ds["deslo"] = {"replica_size": 2, "sync_every": SYNC_EVERY, "checkpoint_mode": "per_replica"}
    return ds
