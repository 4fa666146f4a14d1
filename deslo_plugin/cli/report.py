"""``deslo report``: what runs have moved, waited for and learnt, side by side on one page."""

from pathlib import Path
from typing import Annotated

import typer

from deslo_plugin.cli.output import Json, command, show_json
from deslo_plugin.errors import ConfigError
from deslo_plugin.telemetry.report.charts import png, svgs
from deslo_plugin.telemetry.report.page import html, markdown
from deslo_plugin.telemetry.report.run import Run


@command
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of deslo.telemetry, or single files of them.")],
    out: Annotated[Path, typer.Option(help="The page: one HTML file that loads nothing.")] = Path("report.html"),
    picture: Annotated[Path | None, typer.Option("--png", help="Also draw all charts into this PNG.")] = None,
    text: Annotated[Path | None, typer.Option("--markdown", help="Also write the table as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Loss by step, token and wall clock, bytes by state, waits, drift and a timeline of averages, runs side by
    side."""
    read = [Run(path) for path in runs]
    _expect_names(read)
    if as_json:
        return show_json({run.name: run.as_dict() for run in read})
    page = html(read, svgs(read))
    try:
        out.write_text(page, encoding="utf-8")
        if picture is not None:
            png(read, picture)
        if text is not None:
            text.write_text(markdown(read, picture.name if picture is not None else None), encoding="utf-8")
    except OSError as error:
        raise ConfigError("deslo report", "a place to write to", str(error), "name another file") from error
    typer.echo(f"wrote {', '.join(str(path) for path in (out, picture, text) if path is not None)}")


def _expect_names(runs: list[Run]) -> None:
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            got = f"{names.count(name)} called {name!r}"
            raise ConfigError("deslo report", "runs of different names", got, "rename a folder")
