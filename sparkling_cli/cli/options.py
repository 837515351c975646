"""Option types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparkling_cli.cli import console

CheckpointArg = Annotated[
    Path, typer.Argument(help="Checkpoint directory or file.", metavar="CKPT", show_default=False)
]


def _set(name: str):  # type: ignore[no-untyped-def]
    def callback(value: bool) -> bool:
        if value:
            setattr(console.output, name, True)
        return value

    return callback


JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead.", callback=_set("as_json"), is_eager=True),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.", callback=_set("quiet"))
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every tensor and note.", callback=_set("verbose"))
]
LayoutOption = Annotated[
    Path | None,
    typer.Option("--layout", help="Layout file (TOML) instead of inference.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="Your own model: a callable from a config dict to an nn.Module. It is imported and run.",
        show_default=False,
    ),
]
AxisOption = Annotated[
    list[str],
    typer.Option(
        "--axis", "-a", help="Axis to widen: ffn, hidden, heads, ... May be repeated.", show_default=False
    ),
]
FactorOption = Annotated[
    list[float],
    typer.Option(
        "--factor", "-f", help="New size / old size. One for all axes, or one each.", show_default=False
    ),
]
ToOption = Annotated[
    list[int],
    typer.Option(
        "--to", help="New size instead of a factor. One for all axes, or one each.", show_default=False
    ),
]
SpecOption = Annotated[
    Path | None,
    typer.Option(
        "--spec", help="Expansion spec (YAML, TOML or JSON); options override it.", show_default=False
    ),
]
MultipleOption = Annotated[
    int | None,
    typer.Option("--multiple-of", help="Round sizes given by a factor up to a multiple.", show_default=False),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Text, JSONL or token file (.bin, .npy) to measure on; default: a bundled text.",
        show_default=False,
    ),
]
