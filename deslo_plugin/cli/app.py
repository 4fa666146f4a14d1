"""The commands, collected: each lives in a file of its own."""

from typing import Annotated

import typer

from deslo_plugin.cli.ckpt import inspect
from deslo_plugin.cli.doctor import doctor
from deslo_plugin.cli.plan import plan
from deslo_plugin.cli.probe import probe
from deslo_plugin.cli.report import report
from deslo_plugin.cli.simulate import simulate
from deslo_plugin.version import __version__

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
ckpt = typer.Typer(no_args_is_help=True, help="Checkpoints of deslo_plugin.save.")
app.add_typer(ckpt, name="ckpt")
for command in (plan, probe, doctor, simulate, report):
    app.command()(command)
ckpt.command()(inspect)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and leave.")]


@app.callback()
def deslo(version: Version = False) -> None:
    """DES-LOC and MT-DAO, planned and proved: parameters and momenta averaged between replicas on periods of their
    own."""
