"""Runs of a study that are kept as they finish: stopped and started again, it goes on where it was."""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import Progress

Runs = list[dict[str, Any]]


def finish(
    path: Path,
    settings: Mapping[str, Any],
    train: Callable[..., dict[str, Any]],
    wanted: Callable[[Runs], Iterable[tuple[Any, ...]]],
    processes: int,
) -> Runs:
    """All runs in ``path``, once ``train`` was called with everything that is ``wanted`` beside those there are, and
    again with what these make wanted."""
    runs: Runs = json.loads(path.read_text())["runs"] if path.exists() else []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool, Progress() as bar:
        while left := list(wanted(runs)):
            task = bar.add_task(f"{len(left)} runs", total=len(left))
            for future in as_completed([pool.submit(train, *run) for run in left]):
                runs.append(future.result())
                path.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
                bar.advance(task)
    return runs
