"""``deslo report``: what runs have moved, waited for and learnt, side by side on one page."""

from pathlib import Path
from typing import Annotated

import typer

from deslo_plugin.report.charts import png, svgs
from deslo_plugin.report.page import html, markdown
from deslo_plugin.report.run import Run
from deslo_plugin.strict import ConfigError

UNUSABLE = 2  # exit status


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of deslo.telemetry, or single files of them.")],
    out: Annotated[Path, typer.Option(help="The page: one HTML file that loads nothing.")] = Path("report.html"),
    picture: Annotated[Path | None, typer.Option("--png", help="Also draw all charts into this PNG.")] = None,
    text: Annotated[Path | None, typer.Option("--markdown", help="Also write the table as Markdown.")] = None,
) -> None:
    """Loss by step, token and wall clock, bytes by state, waits, drift and a timeline of averages, runs side by side."""
    try:
        read = [Run(path) for path in runs]
        _same_names(read)
        page = html(read, svgs(read))
        for path, content in ((out, page), (text, markdown(read, picture and picture.name))):
            if path is not None:
                path.write_text(content, encoding="utf-8")
        if picture is not None:
            png(read, picture)
    except ConfigError as error:
        typer.echo(f"deslo: {error}", err=True)
        raise typer.Exit(UNUSABLE) from error
    except OSError as error:
        typer.echo(f"deslo: deslo report: expected a place to write to, got {error}; name another file", err=True)
        raise typer.Exit(UNUSABLE) from error
    typer.echo(f"wrote {', '.join(str(path) for path in (out, picture, text) if path is not None)}")


def _same_names(runs: list[Run]) -> None:
    names = [run.name for run in runs]
    for name in {name for name in names if names.count(name) > 1}:
        raise ConfigError("deslo report", "runs of different names", f"{names.count(name)} called {name!r}", "rename a folder")
