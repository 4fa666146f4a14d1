"""How commands speak: tables for people, ``--json`` for programs, one sentence and a status for what went wrong."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from deslo_plugin.comm.consistency import first_to_say
from deslo_plugin.errors import ConfigError

# exit statuses: something checked is not as it should be; the command cannot be carried out as written
FAILED, UNUSABLE = 1, 2
PLAIN_WIDTH = 132  # of output that no terminal shows

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A ``ConfigError`` becomes its sentence on stderr and status 2, without a traceback."""

    @functools.wraps(function)
    def told(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except ConfigError as error:
            if first_to_say(str(error)):  # under a launcher it comes up on every rank
                typer.echo(f"deslo: {error}", err=True)
            if dist.is_initialized():
                sys.stderr.flush()
                os._exit(UNUSABLE)  # gloo's threads may abort a process that takes itself apart in order
            raise typer.Exit(UNUSABLE) from error

    return told


def first() -> bool:
    """Whether this rank speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def show_json(content: Mapping[str, Any]) -> None:
    if first():
        typer.echo(json.dumps(content, indent=1))


def show(*parts: Any) -> None:
    """Tables and lines, from the first rank."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    if first():
        for part in parts:
            console.print(part, markup=not isinstance(part, str))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> Table:
    """The first ``words`` columns are text, the others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < words else "right")
    for row in rows:
        made.add_row(*row)
    return made


def bytes_of(count: float) -> str:
    """1000-based, four digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} B"


def number(value: float) -> str:
    """Four digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
