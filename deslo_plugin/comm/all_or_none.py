"""What one rank alone can fail at, files above all, agreed on by all of them: nobody waits for a rank that has given
up."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist

from deslo_plugin.comm.process_groups import all_gather_by_rank
from deslo_plugin.errors import ConfigError

T = TypeVar("T")


class Elsewhere(Exception):
    """``error`` came up on the global rank ``rank``, and its group has been told."""

    def __init__(self, rank: int, error: BaseException):
        super().__init__(rank, error)
        self.rank, self.error = rank, error


class AgreedError(OSError):
    """An error that every rank has heard of."""


class _Problem(NamedTuple):
    rank: int
    what: str
    number: int | None  # the system's, if it is the system's


def all_or_none(act: Callable[[], T], world: dist.ProcessGroup | None, access: str = "see and write to") -> T:
    """``act()`` on every rank, and its value; if it fails on any, it has failed on all. Collective.

    Raises ``ConfigError`` on every rank if a rank did, with the ranks that did, and ``OSError`` for whatever else, with
    the rank and the system's error number; ``access`` is what every rank needs to have of a folder.
    """
    value: T | None = None
    problem: ConfigError | _Problem | None = None
    cause: Exception | None = None
    try:
        value = act()
    except AgreedError:
        raise
    except ConfigError as error:
        problem, cause = error, error
    except Exception as error:
        problem, cause = _problem(error), error
    problems: dict[int, Any] = all_gather_by_rank(problem, world) if world is not None else {0: problem}
    problems = {rank: found for rank, found in problems.items() if found is not None}
    for found in problems.values():
        if isinstance(found, ConfigError):
            alike = [rank for rank, other in problems.items() if str(other) == str(found)]
            everyone = world is None or len(alike) == dist.get_world_size(world)
            raise (found if everyone else found.on(alike)) from cause
        rank, what, number = found  # it may have travelled as a list
        needs = f"; expected a folder that every rank can {access}" if number is not None else ""
        message = f"checkpoint: rank {rank} failed: {what}{needs}"
        raise (AgreedError(message) if number is None else AgreedError(number, message)) from cause
    return cast(T, value)


def _problem(error: BaseException) -> _Problem:
    rank = dist.get_rank() if dist.is_initialized() else 0
    if isinstance(error, Elsewhere):
        rank, error = error.rank, error.error
    # what writes a file for torch raises errors of its own while it handles the system's
    system: BaseException | None = error
    while system is not None and not isinstance(system, OSError):
        system = system.__cause__ or system.__context__
    if system is None or system.errno is None:
        return _Problem(rank, repr(error), None)
    return _Problem(rank, f"{system.strerror}" + (f": {system.filename}" if system.filename else ""), system.errno)


def to_os_error(error: BaseException, file: object) -> OSError:
    """``error`` of writing ``file`` as an ``OSError`` that other ranks can be sent, whatever it was."""
    problem = _problem(error)
    if problem.number is None:
        return OSError(f"{file}: {problem.what}")
    return OSError(problem.number, os.strerror(problem.number), str(file))
