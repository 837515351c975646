"""``sparkling architectures``: what the installed transformers offers, and what is proved."""

from __future__ import annotations

from typing import Annotated

import typer

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.console import output


def architectures(
    only: Annotated[list[str], typer.Argument(help="Model types; default: all.", metavar="TYPE")] = [],
    markdown: Annotated[bool, opt.option("--markdown", opt.OUTPUT, "Print docs/architectures.md.")] = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """List what can be widened, class by class.

    Every causal language model class of the installed transformers, and per axis whether widening is
    proved, or refused and why. Each class is inferred and proved on the spot with a tiny random instance;
    results are cached.

    \b
    Examples:
        sparkling architectures llama mixtral
        sparkling architectures --markdown > docs/architectures.md
    """
    import sys

    from sparkling_cli.models import survey

    results = survey.survey(only or None, progress=None if quiet else output.note)
    output.data(survey.result(results))
    if output.as_json:
        return
    if markdown:
        sys.stdout.write(survey.to_markdown(results))
    else:
        output.show(survey.to_table(results))
