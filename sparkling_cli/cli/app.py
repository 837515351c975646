"""The ``sparkling`` command: global options and the list of commands.

Each module ``cli/<name>.py`` has a function of the command's name, whose signature and docstring are the
command's options and help. It must import nothing heavy at its top, so that ``--help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparkling_cli import __version__
from sparkling_cli.cli import console
from sparkling_cli.cli.architectures import architectures
from sparkling_cli.cli.expand import expand
from sparkling_cli.cli.help import Command, Group
from sparkling_cli.cli.inspect import inspect
from sparkling_cli.cli.layout import layout
from sparkling_cli.cli.plan import plan
from sparkling_cli.cli.schedule import schedule
from sparkling_cli.cli.verify import verify

app = typer.Typer(
    name="sparkling",
    # plain help: rich's own takes longer to import than everything else together
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    cls=Group,
    # as wide as the terminal, of whatever width
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": console.UNLIMITED},
    help="""Widen a language model in the middle of pre-training, optimizer state included.

    \b
    To begin with:
        sparkling expand ckpt/ --axis ffn --factor 2
        sparkling verify ckpt/ ckpt-ffn2x/
    """,
    epilog="Exit codes: 0 done, 2 usage, 3 spec, 4 checkpoint, 5 layout, 6 unsafe pickle, 7 output, "
    "8 verification or no-go, 9 missing package, 130 interrupted.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sparkling {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""
    console.output.reset()


for command in (expand, inspect, verify, plan, schedule, layout, architectures):
    app.command(cls=Command)(command)
