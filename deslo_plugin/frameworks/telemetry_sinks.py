"""A run's recorder, connected: the folder of ``deslo.telemetry``, TensorBoard, and what the framework tracks runs
with."""

import atexit
import weakref
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from deslo_plugin.attachment import Attachment
from deslo_plugin.averaging.pseudo_gradient import PseudoGradient
from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.telemetry.recorder import Sink


def start_telemetry(attachment: Attachment) -> None:
    """Begins to write, by ``deslo.telemetry``: one file for each replica, by its first rank.

    Collective over all ranks. Raises ``ConfigError`` on every rank if one of them cannot write, or lacks TensorBoard.
    """
    telemetry, averaging = attachment.config.deslo.telemetry, attachment.averaging
    if telemetry is None:
        return
    folder, world = Path(telemetry.path).expanduser(), attachment.groups.world
    problem = _begin(attachment, folder)
    for rank, told in (all_gather_by_rank(problem, world) if world else {0: problem}).items():
        if told:
            attachment.recorder.end(attachment.plan)
            where, expected, got = told
            raise ConfigError(
                f"deslo.telemetry.{where}", expected, f"{got} on rank {rank}", "mend that, or change the setting"
            )
    if telemetry.pseudo_gradient:
        averaging.receive = PseudoGradient(averaging.receive, averaging.record)
    if telemetry.tensorboard and _first(attachment):
        writer = _tensorboard(folder / "tensorboard")
        add_scalars(attachment, writer)
        attachment.recorder.closing.append(writer.close)
    atexit.register(_end, weakref.ref(attachment))


def _begin(attachment: Attachment, folder: Path) -> tuple[str, str, str] | None:
    """Opens this rank's file, if it has one; what is wrong, if anything is: (key, what it needs, what is there)."""
    if (
        require(attachment.config.deslo.telemetry).tensorboard
        and _first(attachment)
        and find_spec("tensorboard") is None
    ):
        return "tensorboard", "the package tensorboard", "none"
    if attachment.topology.shard == 0:
        try:
            attachment.recorder.start(folder / f"replica-{attachment.topology.replica}.jsonl", attachment.plan)
        except OSError as error:
            return "path", "a folder that every replica can write to", str(error)
    return None


def add_scalars(attachment: Attachment, sink: Sink) -> None:
    """``sink`` gets the scalars of every step with an average; under an engine, which must say when a step has
    ended."""
    attachment.recorder.add_sink(sink)
    if not attachment.engine_steps:
        attachment.optimizer.register_step_post_hook(lambda *_: attachment.recorder.step_ended())


def _first(attachment: Attachment) -> bool:
    return attachment.topology.replica == attachment.topology.shard == 0


class _tensorboard:
    """A sink that writes events into ``folder`` until it is closed."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def __call__(self, scalars: Mapping[str, float], steps: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, steps)

    def close(self) -> None:
        self._writer.close()


def _end(attachment: weakref.ref[Attachment]) -> None:
    if (there := attachment()) is not None:
        there.close()
