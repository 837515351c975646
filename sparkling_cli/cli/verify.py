"""``sparkling verify``: prove an output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.console import output


def verify(
    source: Annotated[Path, opt.checkpoint("The checkpoint that was widened.", "SRC")],
    destination: Annotated[Path, opt.checkpoint("The output to prove.", "DST")],
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Re-read source and output and check every promise.

    The promises are those of the output's manifest. Finds any changed bit in any file, any tensor that is
    not what the manifest derives from the source, any new optimizer entry that is not zero. Exit code 8
    when something does not hold.

    \b
    Example:
        sparkling verify ckpt/ ckpt-ffn2x/
    """
    from rich.text import Text

    from sparkling_cli import api

    report = api.verify(source, destination, progress=output.progress)
    output.data(report)
    for path in report.extras:
        output.note(f"note: {path} was not written with the output; nothing loads it as a part of it")
    output.show(Text(report.summary(), style="green"))
