"""What a folder holds that is no checkpoint of ours, and what to do with it."""

from pathlib import Path

DEEPSPEED = ("*mp_rank_*_model_states.pt", "*_model_states.pt", "*_optim_states.pt", "layer_*-model_*.pt")
KNOWN = (
    (
        DEEPSPEED,
        "a checkpoint of DeepSpeed's own",
        "engine.load_checkpoint(load_dir, tag, load_module_only=True) begins every "
        "replica with its weights; optimizer states of one replica do not fit several",
    ),
    (
        ("latest_universal", "zero/*/fp32.pt"),
        "a universal checkpoint of DeepSpeed",
        "give load the folder of its tag, which has zero/ in it, or engine.load_checkpoint(load_dir, tag): every "
        "replica begins with it",
    ),
    (
        (".metadata",),
        "a checkpoint of torch.distributed.checkpoint alone",
        "load it with torch.distributed.checkpoint.load into the model before attach: every replica begins with it",
    ),
    (
        ("model*.safetensors", "pytorch_model*.bin"),
        "exported weights",
        "load them into the model before attach, as with from_pretrained",
    ),
)


def what_is_there(folder: Path) -> tuple[str, str]:
    """(what was got, what to do), for an error about a folder without ``deslo.json``."""
    if not folder.exists():
        return "none", "check the path: nothing is there, or this rank does not see it"
    if not folder.is_dir():
        return "none", "check the path: it is a file"
    for patterns, kind, do in KNOWN:
        found = next((file.name for pattern in patterns for file in sorted(folder.glob(pattern))), None)
        if found:
            return f"none, but {kind} ({found})", do
    tag = folder / "latest"
    if tag.is_file() and any(next(folder.glob(f"*/{pattern}"), None) for pattern in DEEPSPEED):
        return "none, but a folder of checkpoints of DeepSpeed's own", KNOWN[0][2]
    if next(folder.glob("*/deslo.json"), None):
        return (
            "none, but a folder of checkpoints",
            "load(deslo_plugin.latest_checkpoint(path), model) takes the one with the most steps",
        )
    return "none", (
        "check the path: it is no checkpoint of deslo_plugin.save, or one that was cut off, whose name ends in .part"
    )
