"""What of a run is written down, and where: the block ``deslo.telemetry``."""

from dataclasses import dataclass

from deslo_plugin.config.reader import Reader, repr_with_type


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """``path``: the run's folder, in which one rank of each replica writes a file of its own.

    ``pseudo_gradient``: how well the replicas' steps since their last average agree; costs one more copy of this rank's
    parameters. ``tensorboard``: the first rank's scalars into a folder of that name.
    """

    path: str
    pseudo_gradient: bool = False
    tensorboard: bool = False


def read_telemetry(reader: Reader) -> Telemetry | None:
    """``deslo.telemetry``, off unless it says where to write: a library leaves no files that nobody asked for."""
    block = reader.pop("telemetry")
    if block is None:
        return None
    inner = Reader(f"{reader.where}.telemetry", block)
    path = inner.pop("path")
    if not isinstance(path, str) or not path:
        inner.refuse("path", "the folder of this run", repr_with_type(path), 'name one, such as "runs/first"')
    if "://" in path:
        inner.refuse("path", "a folder on a disk, where files grow", repr(path), "name one, and copy it where you like")
    telemetry = Telemetry(
        path=path,
        pseudo_gradient=inner.boolean("pseudo_gradient", False),
        tensorboard=inner.boolean("tensorboard", False),
    )
    inner.finish()
    return telemetry
