"""``sparkling verify``: prove an output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.console import output
from sparkling_cli.errors import CheckpointError


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
    import shlex

    from rich.text import Text

    from sparkling_cli import api
    from sparkling_cli.manifest import manifest_of

    try:
        report = api.verify(source, destination, progress=output.progress)
    except CheckpointError as error:
        if manifest_of(source) is not None and destination.exists() and manifest_of(destination) is None:
            again = shlex.join(["sparkling", "verify", str(destination), str(source)])
            error.hint = f"the source comes first: {again}"
        raise
    output.data(report)
    for path in report.extras:
        output.note(f"note: {path} was not written with the output; nothing loads it as a part of it")
    output.show(Text(report.summary(), style="green"))
