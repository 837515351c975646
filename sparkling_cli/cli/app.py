"""The ``sparkling`` command: global options and the list of commands.

A command module is imported only when its command runs, so that ``--help`` answers at once. Each
module ``cli/<name>.py`` has a function of the command's name, whose signature and docstring are the
command's options and help; it must import nothing heavy at its top.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparkling_cli.cli import console
from sparkling_cli.cli.expand import expand

app = typer.Typer(
    name="sparkling",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Widen a language model in the middle of pre-training, optimizer state included.",
    epilog="Exit codes: 0 done, 2 usage, 3 spec, 4 checkpoint, 5 layout, 6 unsafe pickle, 7 output, "
    "8 verification, 9 missing package, 130 interrupted.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(console.version_text())
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


app.command()(expand)
