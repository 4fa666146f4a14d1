"""Where the replicas of a DeepSpeed job save: each its own state, so that none overwrites another.

Replica 0 keeps DeepSpeed's layout ``<save_dir>/<tag>``; replica r writes ``<save_dir>/replica_<r>/<tag>``.
"""

import functools
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from deslo_plugin.strict import ConfigError


def keep_replicas_apart(engine: DeepSpeedEngine) -> None:
    """Makes ``save_checkpoint`` and ``load_checkpoint`` per replica, and refuses exports of un-averaged weights."""
    topology = engine.deslo.topology
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def folder(path: str) -> str:
        return str(path) if topology.replica == 0 else str(Path(path) / f"replica_{topology.replica}")

    @functools.wraps(save)
    def save_checkpoint(save_dir: str, *args: Any, **options: Any) -> bool:
        Path(folder(save_dir)).mkdir(parents=True, exist_ok=True)
        return save(folder(save_dir), *args, **options)

    @functools.wraps(load)
    def load_checkpoint(load_dir: str, tag: Any = None, **options: Any) -> tuple[str | None, dict | None]:
        latest = Path(load_dir) / "latest"
        if tag is None and latest.is_file():
            tag = latest.read_text().strip()
        if tag is not None:
            _refuse_other_replicas(Path(load_dir), str(tag), topology.replicas)
        engine.deslo.averaging.abandon()
        return load(folder(load_dir), tag, **options)

    def save_16bit_model(*args: Any, **options: Any) -> None:
        raise ConfigError("save_16bit_model", "one model", f"{topology.replicas} replicas that differ between averages",
                          "save deslo_plugin.averaged_state_dict(engine) instead")

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    if topology.replicas > 1:
        engine.save_16bit_model = engine.save_fp16_model = save_16bit_model


def _refuse_other_replicas(load_dir: Path, tag: str, replicas: int) -> None:
    """A checkpoint holds the state of each replica: it resumes on as many as saved it."""
    saved = 1 + len(list(load_dir.glob(f"replica_*/{tag}")))
    if (load_dir / tag).is_dir() and saved != replicas:
        raise ConfigError(f"load_checkpoint({str(load_dir)!r}, {tag!r})", f"{saved} replica(s), as saved",
                          f"{replicas}", "resume with as many replicas (world size / deslo.replica_size)")
